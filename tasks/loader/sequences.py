"""Sequences of any length as arrays of a batch: each in a row of its own, padded to the longest one.

files ─ address and length of each sample's value ─ cut to max_length ─ copied to the beginning of its row
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tasks.io.errors import ConfigError, CorruptVersion
from tasks.io.tensors import AnyArray, Int64Array, TensorSpec
from tasks.loader.arguments import whole_number
from tasks.loader.kernel import copy_values, number_elements
from tasks.loader.placement import Placement
from tasks.loader.samples import LENGTH, SEQUENCE, SampleFormat
from tasks.loader.shards import Shards
from tasks.loader.version_files import CURE

SEGMENT, POSITION = "segment", "position"
OWN = (SEQUENCE, LENGTH)
"""Columns that are made here, and not gathered."""
_LENGTH = TensorSpec((), "int64")


class _Source(Protocol):
    shards: Shards


@dataclass(frozen=True, slots=True)
class Padding:
    """Makes arrays of sequences.

    Attributes:
        spec: a sequence, as it is stored.
        max_length: elements after which a sequence is cut; None: nowhere.
        value: what follows a sequence in its row.
    """

    spec: TensorSpec
    max_length: int | None
    value: float

    def cut(self, lengths: Int64Array) -> Int64Array:
        """Return the lengths of sequences as they are delivered."""
        return lengths if self.max_length is None else np.minimum(lengths, self.max_length)

    def fill(
        self,
        sources: Sequence[_Source],
        picked: Sequence[tuple[int, Int64Array]],
        place: Placement,
        columns: Sequence[str],
        bound: int | None = None,
    ) -> tuple[dict[str, AnyArray], Int64Array, int]:
        """Return those of the columns 'sequence', (n, longest), and 'length', (n,), that are asked for.

        Args:
            sources: The sources.
            picked: Number of each source, and its usable samples.
            place: Maker of batches.
            columns: Columns of the batch.
            bound: Elements of a row; None: as many as the longest sequence has.

        Returns:
            The columns; the lengths as stored, (n,); and the bytes that were read.

        """
        found = [sources[number].shards.find(index) for number, index in picked]
        addresses, sizes = (np.concatenate(each) for each in zip(*found, strict=True))
        width, count = self.spec.width, len(addresses)
        stored = sizes // width
        lengths, made = self.cut(stored), dict[str, AnyArray]()
        if LENGTH in columns:
            made[LENGTH] = place.buffer(_LENGTH, count)
            made[LENGTH][:] = lengths
        if SEQUENCE not in columns:
            return made, stored, 0
        longest = int(lengths.max(initial=0)) if bound is None else bound
        if (lengths > longest).any():
            raise other_lengths()
        rows = made[SEQUENCE] = self.rows(place, count, longest)
        copy_values(addresses, lengths * width, rows.ctypes.data + np.arange(count) * longest * width)
        return made, stored, int(lengths.sum()) * width

    def rows(self, place: Placement, count: int, longest: int) -> AnyArray:
        """Return rows of padding, (count, longest), in memory of a batch."""
        rows = _zeros(place, self.spec.dtype, count, longest)
        if self.value:
            rows[...] = self.value
        return rows

    def pack(
        self,
        source: _Source,
        picked: tuple[Int64Array, Int64Array],
        place: Placement,
        columns: Sequence[str],
        shape: tuple[int, int],
    ) -> tuple[dict[str, AnyArray], Int64Array, int]:
        """Return the columns of packed rows: 'sequence' with 'segment' and 'position', and others by segment.

        Args:
            source: The source.
            picked: Its usable samples, (m,), and the row of each, ascending.
            place: Maker of batches.
            columns: Columns of the batch.
            shape: Rows, and elements of each.

        Returns:
            The columns; the lengths as stored, (m,); and the bytes that were read.

        """
        (index, row_of), (count, longest) = picked, shape
        addresses, sizes = source.shards.find(index)
        width = self.spec.width
        stored = sizes // width
        lengths, made, read = self.cut(stored), dict[str, AnyArray](), 0
        before = np.cumsum(lengths) - lengths
        first = np.searchsorted(row_of, row_of)  # sample of the row
        number, offset = np.arange(len(index)) - first, before - before[first]
        if (offset + lengths > longest).any():
            raise other_lengths()
        if SEQUENCE in columns:
            made[SEQUENCE] = self.rows(place, count, longest)
            start = row_of * longest + offset
            copy_values(addresses, lengths * width, made[SEQUENCE].ctypes.data + start * width)
            read = int(lengths.sum()) * width
            segment, position = (_zeros(place, "int32", count, longest) for _ in range(2))
            number_elements(start, lengths, number + 1, segment.reshape(-1), position.reshape(-1))
            made |= {SEGMENT: segment, POSITION: position}
        most = int(number.max(initial=-1)) + 1
        specs = source.shards.columns
        plain = {
            name: np.empty((len(index), *specs[name].shape), specs[name].dtype) for name in columns if name not in OWN
        }
        source.shards.gather(index, plain)
        for name, values in (({LENGTH: lengths} if LENGTH in columns else {}) | plain).items():
            made[name] = _zeros(place, specs[name].dtype, count, most, *specs[name].shape)
            made[name][row_of, number] = values
            read += values.nbytes
        return made, stored, read


def other_lengths() -> CorruptVersion:
    """Return the error for sequences longer than their column of lengths said when the stream was opened."""
    return CorruptVersion(f"sequences are longer than their lengths said when the stream was opened: {CURE}")


def _zeros(place: Placement, dtype: str, *shape: int) -> AnyArray:
    """Return an array of zeros in memory of a batch, which is reused by its size: few sizes, whatever the shape."""
    size = math.prod(shape)
    memory = place.buffer(TensorSpec((), dtype), 1 << max(size - 1, 0).bit_length())
    values = memory[:size].reshape(shape)
    values[...] = 0
    return values


def padding_of(definition: Mapping[str, Any], max_length: Any, pad_value: Any, **others: Any) -> Padding | None:
    """Return how the sequences of a version are made arrays; None if it has none.

    Args:
        definition: `manifest.definition` of the version.
        max_length: As of `BatchStream`.
        pad_value: Likewise.
        others: Arguments that sequences don't go with, by name, and None or False if they aren't given.

    Raises:
        ConfigError: an argument is invalid, or doesn't fit the version.
    """
    form = SampleFormat.of(definition)
    if form.kind != "sequences":
        given = {"max_length": max_length} if max_length is not None else {}
        given |= {"pad_value": pad_value} if pad_value != 0 else {}
        for name, value in given.items():
            raise ConfigError(f"{name} = {value!r}: the version has no sequences; leave it out")
        return None
    for name, value in others.items():
        if value:
            raise ConfigError(f"{name} = {value!r}: sequences are delivered as they are stored; leave it out")
    if max_length is not None:
        cure = "give the elements after which sequences are cut, at least 1"
        max_length = whole_number("max_length", max_length, cure, least=1)
    spec = form.columns[SEQUENCE]
    try:
        value = np.array([pad_value]).astype(spec.dtype, casting="unsafe")[0].item()
        fits = not isinstance(pad_value, bool) and (value == pad_value or spec.dtype == "float32")
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ConfigError(f"pad_value = {pad_value!r} is no {spec.dtype}, as the sequences are: give one")
    return Padding(spec, max_length, pad_value)
