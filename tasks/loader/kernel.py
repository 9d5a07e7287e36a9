"""The loader's inner loops, compiled by numba: shuffling, gathering rows from mapped files, normalising.

All release the GIL, so that a training loop in Python continues beside them. Numba is imported at the first call of
any of them: it takes longer than opening a version, which needs none.
"""

from __future__ import annotations

import mmap
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.io.compiled import Compiled
from tasks.io.tensors import Float32Array, Int32Array, Int64Array, UInt8Array, UInt64Array

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)
_NEVER = np.int64(2**63 - 1)

UNKNOWN, GOOD, BAD = np.uint8(0), np.uint8(1), np.uint8(2)
_LISTED = np.uint8(3)
_PAGE = mmap.PAGESIZE
_POPULATE_READ = 22
_AHEAD = 16  # rows that are fetched while as many are copied


class Places(NamedTuple):
    """Place of each sample: files, and in them row groups of consecutive samples.

    Attributes:
        files: (F + 1,) first sample of each file, and the end.
        near: File of every `1 << shift`-th sample.
        shift: See `near`.
        groups: (F + 1,) first row group of each file in the following arrays; an unmapped file has none.
        size: (F,) samples of the first row group of each file; other groups rarely differ.
        starts: (G,) first sample of each row group.
        batches: (F,) number of the first batch of each file.
        batch_size: Samples of a batch with a checksum.
    """

    files: Int64Array
    near: Int32Array
    shift: int
    groups: Int64Array
    size: Int64Array
    starts: Int64Array
    batches: Int64Array
    batch_size: int


class Values(NamedTuple):
    """Places of values of any length.

    Attributes:
        located: (F,) address of the array of places of each file's values; 0 for files that weren't located.
        addresses: (F,) address of each file's first byte.
        ends: (F,) address of its end.
    """

    located: Int64Array
    addresses: Int64Array
    ends: Int64Array


def _code_of_copy(_context: Any, _to: Any, _origin: Any, _count: Any) -> Any:
    """Generate a call of the C library's memcpy between two addresses, given as numbers."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils

    tools: Any = cgutils

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(address, byte) for address in arguments[:2])
        tools.raw_memcpy(builder, target, source, arguments[2], 1)

    return types.void(types.int64, types.int64, types.int64), build


def _code_of_prefetch(_context: Any, _address: Any) -> Any:
    """Generate a prefetch of the cache line at an address, beside other instructions."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils

    tools: Any = cgutils

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = tools.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        to_read, into_all_levels, as_data = number(0), number(3), number(1)
        builder.call(function, [builder.inttoptr(arguments[0], byte), to_read, into_all_levels, as_data])

    return types.void(types.int64), build


def _code_of_populate(_context: Any, _address: Any, _length: Any) -> Any:
    """Generate a call of Linux' madvise(…, MADV_POPULATE_READ); kernels before 5.14 don't know it and do nothing."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils

    tools: Any = cgutils

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(number, [byte, ir.IntType(64), number])
        function = tools.get_or_insert_function(builder.module, kind, "madvise")
        builder.call(function, [builder.inttoptr(arguments[0], byte), arguments[1], number(_POPULATE_READ)])

    return types.void(types.int64, types.int64), build


_copy: Any = None
_prefetch: Any = None
_populate: Any = None

jit = Compiled(
    globals(),
    {"_copy": _code_of_copy, "_prefetch": _code_of_prefetch, "_populate": _code_of_populate},
    error_model="numpy",
)


@jit
def mix(value: Any) -> Any:
    """Return the finaliser of splitmix64 (see `tasks.io.hashing`), uint64 → uint64."""
    value = (value ^ (value >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    return value ^ (value >> np.uint64(31))


@jit
def draw_key(seed: Any, epoch: Any, level: Any, number: Any) -> Any:
    """Return the key of a shuffle, uint64: from seed, epoch, level, and number within the level."""
    key = mix(np.uint64(seed) + _GOLDEN)
    key = mix((key ^ np.uint64(epoch)) + _GOLDEN)
    key = mix((key ^ np.uint64(level)) + _GOLDEN)
    return mix((key ^ np.uint64(number)) + _GOLDEN)


@jit
def sample_keys(  # noqa: PLR0917 - compiled functions take numbers one by one
    seed: int, epoch: int, level: int, numbers: Int64Array, copies: Int64Array, out: UInt64Array
) -> None:
    """Write the key of each sample in an epoch, (n,): of its number, and of which of its copies it is."""
    for i in range(len(numbers)):
        out[i] = mix((draw_key(seed, epoch, level, numbers[i]) ^ np.uint64(copies[i])) + _GOLDEN)


@jit
def shuffle(values: Int64Array, key: Any) -> None:
    """Shuffle in place by Fisher-Yates; draw i is the splitmix64 of key + i. For fewer than 2**32 values."""
    for i in range(len(values) - 1, 0, -1):
        bits = mix(key + np.uint64(i) * _GOLDEN)
        j = np.int64(((bits >> _HALF) * np.uint64(i + 1)) >> _HALF)
        values[i], values[j] = values[j], values[i]


@jit
def deal(  # noqa: PLR0917 - compiled functions take numbers one by one
    turns: Int64Array, samples: int, start: int, count: int, low: int, high: int
) -> tuple[Int64Array, int]:
    """Sort some consecutive samples of an epoch by stream, and take a part of them.

    Args:
        turns: (S,) turn of each stream: it holds the samples at positions whose remainder by S is its turn.
        samples: Samples of the epoch; after the last one it starts again.
        start: Position of the first sample, below `samples`.
        count: Number of samples.
        low: Start of the part among the sorted samples.
        high: End of the part.

    Returns:
        (n, 3) stream, place in the stream, and number of samples of each run, repeated samples last; and the number
        of samples of the part that aren't repeated.

    """
    streams, laps = len(turns), (start + count - 1) // samples + 1
    runs, found, real = np.empty((streams * laps, 3), np.int64), 0, 0
    for again in range(min(laps, 2)):
        before = 0
        for stream in range(streams):
            for lap in range(laps):
                first = start if lap == 0 else 0
                end = min(start + count - lap * samples, samples)
                place = (first - turns[stream] + streams - 1) // streams
                size = (end - turns[stream] + streams - 1) // streams - place
                skipped = max(low - before, 0)
                taken = min(size, high - before) - skipped
                before += size
                if taken > 0 and again == min(lap, 1):
                    runs[found] = stream, place + skipped, taken
                    found += 1
                    real += 0 if again else taken
    return runs[:found], real


@jit
def deal_parts(turns: Int64Array, samples: int, parts: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Take parts as `deal` does, one after the other.

    Args:
        turns: As for `deal`.
        samples: Likewise.
        parts: (P, 4) start, count, low and high of each part.

    Returns:
        (n, 3) runs of all parts; and (P,) the number of samples of each part that aren't repeated.

    """
    real, most = np.empty(len(parts), np.int64), 0
    for part in range(len(parts)):
        most += len(turns) * ((parts[part, 0] + parts[part, 1] - 1) // samples + 1)
    runs, found = np.empty((most, 3), np.int64), 0
    for part in range(len(parts)):
        start, count, low, high = parts[part]
        own, real[part] = deal(turns, samples, start, count, low, high)
        runs[found : found + len(own)] = own
        found += len(own)
    return runs[:found], real


@jit
def spread_sources(quotas: Int64Array, position: int, counts: Int64Array, ends: Int64Array, out: Int64Array) -> None:
    """Go on through a sequence that spreads each source evenly, and write the counts before some positions.

    In any n first places of the periodic sequence, a source has its share of n, rounded down or up. Its k-th item may
    come from place floor(k / share) on, and must come before place ceil((k + 1) / share); of those that may come, the
    one that must come first is taken, which meets all terms since the shares add up to one.

    Args:
        quotas: (S,) items of each source in a period, of fewer than 2**31 items.
        position: Place to go on from.
        counts: (S,) items of each source before it; updated.
        ends: (E,) places in ascending order, none before `position`.
        out: (E, S) items of each source before these places.

    """
    period, sources = quotas.sum(), len(quotas)
    first, last = np.empty(sources, np.int64), np.empty(sources, np.int64)
    for source in range(sources):
        quota = quotas[source]
        first[source] = counts[source] * period // quota if quota else _NEVER
        last[source] = ((counts[source] + 1) * period - 1) // quota if quota else _NEVER
    for end in range(len(ends)):
        for place in range(position, ends[end]):
            best, term = 0, _NEVER
            for source in range(sources):
                if first[source] <= place and last[source] < term:
                    best, term = source, last[source]
            counts[best] += 1
            first[best] = counts[best] * period // quotas[best]
            last[best] = ((counts[best] + 1) * period - 1) // quotas[best]
        position = ends[end]
        out[end] = counts


@jit
def draw_sources(  # noqa: PLR0917 - compiled functions take arrays one by one
    quotas: Int64Array, position: int, counts: Int64Array, ends: Int64Array, out: Int64Array, key: Any
) -> None:
    """Go on through a random permutation of the quotas' items, and write the counts before some positions.

    Arguments are those of `spread_sources`, and the key of the draws. Each item is drawn from those that are left.
    """
    period, sources = quotas.sum(), len(quotas)
    for end in range(len(ends)):
        for place in range(position, ends[end]):
            lap = place // period
            bits = mix(key + np.uint64(place) * _GOLDEN)
            drawn = np.int64(((bits >> _HALF) * np.uint64((lap + 1) * period - place)) >> _HALF)
            source = 0
            while source < sources - 1:
                drawn -= (lap + 1) * quotas[source] - counts[source]
                if drawn < 0:
                    break
                source += 1
            counts[source] += 1
        position = ends[end]
        out[end] = counts


@jit
def fill_buckets(buckets: Int64Array, count: int, size: int, out: Int64Array) -> None:
    """Write the places of samples as they fill steps: each of one bucket, then of those that are left.

    Args:
        buckets: (n,) bucket of each sample.
        count: Number of buckets.
        size: Samples of a step.
        out: (n,) the places; those left come bucket by bucket.
    """
    size = min(size, len(buckets) + 1)
    waiting, filled, done = np.empty((count, size), np.int64), np.zeros(count, np.int64), 0
    for i in range(len(buckets)):
        bucket = buckets[i]
        waiting[bucket, filled[bucket]] = i
        filled[bucket] += 1
        if filled[bucket] == size:
            out[done : done + size] = waiting[bucket]
            done += size
            filled[bucket] = 0
    for bucket in range(count):
        out[done : done + filled[bucket]] = waiting[bucket, : filled[bucket]]
        done += filled[bucket]


@jit
def fill_rows(lengths: Int64Array, size: int, limit: int, out: Int64Array) -> int:
    """Lay samples into rows by first fit, and write the row of each; return the number of rows.

    Args:
        lengths: (n,) elements of each sample, at most `size`.
        size: Elements of a row.
        limit: Rows that are open at the same time; the oldest is closed for a new one.
        out: (n,) the rows.
    """
    left, first, end = np.zeros(limit, np.int64), 0, 0  # a ring of open rows
    for i in range(len(lengths)):
        row = first
        while row < end and left[row % limit] < lengths[i]:
            row += 1
        if row == end:
            left[end % limit] = size
            end += 1
            first = max(first, end - limit)
        left[row % limit] -= lengths[i]
        out[i] = row
    return end


@jit
def number_elements(
    starts: Int64Array, lengths: Int64Array, numbers: Int64Array, segment: Int32Array, position: Int32Array
) -> None:
    """Write the number of each sample, and the places in it, at its elements, from its start on."""
    for i in range(len(starts)):
        for j in range(lengths[i]):
            segment[starts[i] + j] = numbers[i]
            position[starts[i] + j] = j


@jit
def samples_of(firsts: Int64Array, chunk: int, end: int, out: Int64Array) -> int:
    """Write the samples of chunks below an end to `out`; return their number."""
    count = 0
    for first in firsts:
        for sample in range(first, min(first + chunk, end)):
            out[count] = sample
            count += 1
    return count


@jit
def collect(  # noqa: PLR0917 - compiled functions take arrays one by one
    runs: Int64Array, run: int, windows: Int64Array, starts: Int64Array, ends: Int64Array, out: Int64Array, done: int
) -> tuple[int, int]:
    """Copy the samples of runs from the windows of their streams, up to a missing window.

    Args:
        runs: (n, 3) stream, place in the stream, and number of samples; copied ones are subtracted.
        run: First run.
        windows: (S, W) samples of a window of each stream.
        starts: (S,) place in the stream at which its window begins.
        ends: (S,) place at which its window ends.
        out: Array for the samples.
        done: Number of samples in it already.

    Returns:
        The run whose next sample is in another window, n if there is none; and the number of samples in `out`.

    """
    while run < len(runs):
        stream, place, count = runs[run]
        if not starts[stream] <= place < ends[stream]:
            break
        here, within = min(count, ends[stream] - place), place - starts[stream]
        for i in range(here):
            out[done + i] = windows[stream, within + i]
        done += here
        if here == count:
            run += 1
        else:
            runs[run, 1] += here
            runs[run, 2] -= here
    return run, done


@jit
def _file(places: Places, sample: Any) -> Any:
    file = np.int64(places.near[sample >> places.shift])
    while sample >= places.files[file + 1]:
        file += 1
    return file


@jit
def _group(places: Places, sample: Any) -> Any:
    file = _file(places, sample)
    first, end = places.groups[file], places.groups[file + 1]
    group = min(first + (sample - places.files[file]) // places.size[file], end - 1)
    while group + 1 < end and sample >= places.starts[group + 1]:
        group += 1
    while group > first and sample < places.starts[group]:
        group -= 1
    return group


@jit
def gather(  # noqa: PLR0912, PLR0917 - compiled functions take arrays one by one
    places: Places,
    index: Int64Array,
    parts: Int64Array,
    firsts: Int64Array,
    addresses: Int64Array,
    widths: Int64Array,
    to: Int64Array,
    located: int,
    found: Int64Array,
) -> None:
    """Copy the values of some samples of several sources, one after the other, for each column.

    Rows are anywhere in a window of megabytes. Prefetching the next rows while some are copied takes about 50 ns
    a row of 20 numbers, instead of 100.

    Args:
        places: Places of the samples of all sources, as one sequence.
        index: Samples by their numbers in their source, all of them in mapped files.
        parts: (P, 3) source of each part of the n samples, its place in `index`, and the number of its samples.
        firsts: (S,) place of each source's first sample in the sequence.
        addresses: (C, G) start of each row group's values, for each column.
        widths: (C,) bytes of a value.
        to: (C,) addresses of memory for n values.
        located: Number of the column whose values are found instead of copied; -1 for none.
        found: (n,) their addresses; none without such a column.
    """
    count, columns = parts[:, 2].sum(), len(widths)
    groups, rows = np.empty((2, _AHEAD), np.int64), np.empty((2, _AHEAD), np.int64)
    part, begin, end = -1, 0, 0
    for start in range(0, count + _AHEAD, _AHEAD):
        coming = start // _AHEAD % 2
        group, row = groups[coming], rows[coming]
        for i in range(min(_AHEAD, count - start)):
            while start + i >= end:
                part += 1
                begin, end = end, end + parts[part, 2]
            sample = firsts[parts[part, 0]] + index[parts[part, 1] + start + i - begin]
            group[i] = _group(places, sample)
            row[i] = sample - places.starts[group[i]]
        for column in range(columns):
            width = widths[column]
            for i in range(min(_AHEAD, count - start)):
                address = addresses[column, group[i]] + row[i] * width
                if column == located:
                    found[start + i] = address
                    continue
                _prefetch(address)
                if width > 8:
                    _prefetch(address + min(width, 128) - 1)
        if start > 0:
            group, row = groups[1 - coming], rows[1 - coming]
            for column in range(columns):
                if column == located:
                    continue
                width = widths[column]
                target = to[column] + (start - _AHEAD) * width
                for i in range(min(_AHEAD, count - start + _AHEAD)):
                    address = addresses[column, group[i]] + row[i] * width
                    if width == 8:  # a constant is no call
                        _copy(target + i * 8, address, 8)
                    else:
                        _copy(target + i * width, address, width)


@jit
def unlocated_files(places: Places, index: Int64Array, values: Values, out: Int64Array) -> int:
    """Write the files of some samples whose values of any length have no known place to `out`; return their number."""
    count = 0
    for sample in index:
        file = _file(places, sample)
        if not values.located[file]:
            new = True
            for i in range(count):
                new = new and out[i] != file
            if new:
                out[count] = file
                count += 1
    return count


@jit
def find_values(places: Places, index: Int64Array, values: Values, out: Int64Array) -> int:
    """Write address and bytes of each sample's value of any length to `out`, (2, n).

    The bytes are those before the value. Return the first sample whose value would go beyond its file, -1 if none does.
    """
    count, address, size = len(index), out[0], out[1]
    to = out.ctypes.data
    size[:] = 0
    for i in range(count):
        file = _file(places, index[i])
        _copy(to + 8 * i, values.located[file] + 8 * (index[i] - places.files[file]), 8)
        address[i] += values.addresses[file]
        _prefetch(address[i] - 4)
    odd = -1
    for i in range(count):
        _copy(to + 8 * (count + i), address[i] - 4, 4)
        if address[i] + size[i] > values.ends[_file(places, index[i])]:
            odd = i if odd < 0 else odd
    return odd


@jit
def copy_values(addresses: Int64Array, sizes: Int64Array, to: Int64Array) -> None:
    """Copy values of any length: (n,) addresses, bytes, and addresses to copy them to."""
    count = len(addresses)
    for i in range(min(_AHEAD, count)):
        _prefetch(addresses[i])
    for i in range(count):
        if i + _AHEAD < count:
            _prefetch(addresses[i + _AHEAD])
        _copy(to[i], addresses[i], sizes[i])


@jit
def fetch_values(addresses: Int64Array, ends: Int64Array, stop: UInt8Array) -> None:
    """Read some ranges of memory from the disk; see `fetch`."""
    for i in range(len(addresses)):
        if not stop[0]:
            page = addresses[i] // _PAGE * _PAGE
            _populate(page, ends[i] - page)


@jit
def fetch(  # noqa: PLR0917 - compiled functions take arrays one by one
    places: Places, firsts: Int64Array, ends: Int64Array, addresses: Int64Array, widths: Int64Array, stop: UInt8Array
) -> None:
    """Read chunks of samples from the disk, and enter their pages into this process's table.

    Touched one by one, pages of an image of 150 KB cost 30 to 50 µs, even if they are in memory; this way 11 µs.

    Args:
        places: Places of samples.
        firsts: (n,) first samples of the chunks, all of them in mapped files.
        ends: (n,) ends of the chunks.
        addresses: (C, G) start of each row group's values, for each column.
        widths: (C,) bytes of a value.
        stop: (1,) a value other than 0 stops it.
    """
    for i in range(len(firsts)):
        sample, end = firsts[i], ends[i]
        while sample < end and not stop[0]:
            group, file = _group(places, sample), _file(places, sample)
            last = places.starts[group + 1] if group + 1 < places.groups[file + 1] else places.files[file + 1]
            count = min(end, last) - sample
            for column in range(len(widths)):
                address = addresses[column, group] + (sample - places.starts[group]) * widths[column]
                page = address // _PAGE * _PAGE
                _populate(page, address + count * widths[column] - page)
            sample += count


@jit
def files_of(places: Places, firsts: Int64Array, ends: Int64Array, out: Int64Array) -> int:
    """Write the files of some ranges of samples to `out`, each once, in their order; return their number."""
    seen, count = np.zeros(len(out), np.uint8), 0
    for i in range(len(firsts)):
        for file in range(_file(places, firsts[i]), _file(places, ends[i] - 1) + 1):
            if not seen[file]:
                seen[file] = 1
                out[count] = file
                count += 1
    return count


@jit
def batches_of(places: Places, index: Int64Array, out: Int64Array) -> None:
    """Write the batch of each sample to `out`."""
    for i in range(len(index)):
        file = _file(places, index[i])
        out[i] = places.batches[file] + (index[i] - places.files[file]) // places.batch_size


@jit
def unknown_batches(batches: Int64Array, status: UInt8Array, out: Int64Array) -> Any:
    """Write the unchecked batches to `out`, each once; return their number."""
    count = 0
    for batch in batches:
        if status[batch] == UNKNOWN:
            status[batch] = _LISTED
            out[count] = batch
            count += 1
    for i in range(count):
        status[out[i]] = UNKNOWN
    return count


@jit
def normalise_rows(values: Float32Array, mean: Float32Array, std: Float32Array, out: Float32Array) -> None:
    """Write (values - mean) / std of each column; (n, F); `out` may be `values`."""
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            out[i, j] = (values[i, j] - mean[j]) / std[j]


@jit
def normalise_planes(values: UInt8Array, factor: Float32Array, shift: Float32Array, out: Float32Array) -> None:
    """Write values * factor + shift of each channel; (n, C, P) → (n, C, P)."""
    for i in range(values.shape[0]):
        for c in range(values.shape[1]):
            by, plus = factor[c], shift[c]
            for p in range(values.shape[2]):
                out[i, c, p] = np.float32(values[i, c, p]) * by + plus


@jit
def normalise_pixels(values: UInt8Array, factor: Float32Array, shift: Float32Array, out: Float32Array) -> None:
    """Write the result of `normalise_planes`, transposed to (n, P, C)."""
    for i in range(values.shape[0]):
        for p in range(values.shape[2]):
            for c in range(values.shape[1]):
                out[i, p, c] = np.float32(values[i, c, p]) * factor[c] + shift[c]


@jit
def separate(pixels: npt.NDArray[np.uint32], out: UInt8Array) -> None:
    """Write pixels of 32 bits, red first, as the planes of a picture: (P,) → (3, P)."""
    red, green, blue = out[0], out[1], out[2]
    for p in range(len(pixels)):
        red[p], green[p], blue[p] = pixels[p] & 255, pixels[p] >> np.uint32(8) & 255, pixels[p] >> np.uint32(16) & 255


@jit
def mix_samples(  # noqa: PLR0917 - compiled functions take arrays one by one
    values: Any, own: Int64Array, partner: Int64Array, weights: Float32Array, boxes: Int64Array, rounding: Any, out: Any
) -> None:
    """Write each sample mixed with its partner: with a box of it, or blended.

    Args:
        values: (m, C, H, W) uint8 or float32.
        own: (n,) row of each sample in `values`.
        partner: (n,) row of its partner.
        weights: (n,) weight of the sample where it is blended; 1 - weight is the partner's.
        boxes: (n, 4) top, left, bottom and right of the partner's box; an empty one where they are blended.
        rounding: float32 that is added to blended values: 0.5 for bytes, which are cut off when they are stored.
        out: (n, C, H, W), of the same type.
    """
    channels, height, width = values.shape[1:]
    for i in range(len(own)):
        weight, rest = weights[i], np.float32(1) - weights[i]
        top, left, bottom, right = boxes[i]
        boxed = top < bottom and left < right
        for c in range(channels):
            for y in range(height):
                row, other, line = values[own[i], c, y], values[partner[i], c, y], out[i, c, y]
                if boxed or own[i] == partner[i]:
                    for x in range(width):
                        line[x] = row[x]
                    if top <= y < bottom:
                        for x in range(left, right):
                            line[x] = other[x]
                else:
                    for x in range(width):
                        line[x] = np.float32(row[x]) * weight + np.float32(other[x]) * rest + rounding
