"""Single samples of a version by their id or their number, checked like those of batches."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.io.errors import CorruptVersion, InputError
from tasks.loader.arguments import LIMIT, whole_number
from tasks.loader.placement import Placement
from tasks.loader.shards import Shards
from tasks.loader.version_files import CURE, Version, stored_column


class Lookup:
    """Samples of a split, one by one.

    The first look-up by id reads all ids of the split, which then take 16 bytes each.

    Args:
        version: The version.
        split: The split.
        shards: Its samples, for this object alone, with the columns to return picked.
        place: Maker of batches, for this object alone.

    """

    def __init__(self, version: Version, split: str, shards: Shards, place: Placement) -> None:
        self._version, self._split, self._shards, self._place = version, split, shards, place
        self._ids = self._order = np.empty(0, np.int64)

    def sample(self, sample_id: Any, index: Any) -> dict[str, Any]:
        """Return the columns of one sample, by its id or by its number.

        Raises:
            InputError: there is no such sample, or not exactly one of the arguments is given.
            CorruptVersion: it is damaged or missing.
        """
        if (sample_id is None) == (index is None):
            raise InputError("sample: give either an id or index=, the number of the sample in the split")
        if index is None:
            index = self._index_of(whole_number("sample_id", sample_id, "ids are of int64", least=-LIMIT))
        last = self._shards.samples - 1
        cure = f"split {self._split!r} of {self._version.uri} has samples 0 to {last}"
        number = np.array([whole_number("index", index, cure, below=last + 1)], np.int64)
        good = self._shards.usable(number)
        if good is not None and not good[0]:
            raise CorruptVersion(f"sample {number[0]} of {self._version.uri} is damaged or missing: {CURE}")
        names = self._shards.picked
        gathered = {name: self._place.buffer(self._shards.columns[name], 1) for name in names}
        self._shards.gather(number, gathered)
        return {name: values[0] for name, values in self._place.receive(self._place.place(gathered)).items()}

    def _index_of(self, sample_id: int) -> int:
        if not len(self._ids):
            ids = stored_column(self._version, self._split, "sample_id")
            self._order = np.argsort(ids, kind="stable")
            self._ids = ids[self._order]
        place = int(np.searchsorted(self._ids, sample_id))
        if place == len(self._ids) or self._ids[place] != sample_id:
            raise InputError(
                f"sample_id = {sample_id}: split {self._split!r} of {self._version.uri} has no such sample; "
                "give one from its column 'sample_id', or its number as index="
            )
        return int(self._order[place])

    def close(self) -> None:
        """Stop downloads."""
        self._shards.close()
