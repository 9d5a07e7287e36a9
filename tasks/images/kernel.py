"""The fused CPU kernel: one decoded image → K augmented variants, compiled by numba.

    crop ─ resize along y ─ turn ─ resize along x ─ flip and rotate in one gather ─ colour operations by rows ─ uint8

The operations and their rounding are torchvision's on uint8 tensors (`torchvision.transforms.v2.functional`):
antialiased triangle resampling with a rounding to uint8 between the axes, nearest rotation with black corners, and
colour operations that truncate to uint8 after each. The kernel's tests list and bound the differences:
resampling sums in float32 along y first (torch: int16 weights, x first), so a pixel may be one level off.

It is fast because an image is decoded once; everything works on a few kilobytes that stay in the cache; resampling
along x is done as resampling along y of the turned picture, which vectorises; colours are float32 rows, so that four
operations cost one conversion from and to uint8. The GIL is released.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tasks.images.config import Augmentation
from tasks.images.draws import Draws, window
from tasks.io.tensors import AnyArray, Float32Array, Int64Array, UInt8Array

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

_F = np.float32
_RED, _GREEN, _BLUE = _F(0.2989), _F(0.587), _F(0.114)
_ZERO, _ONE, _TWO, _THREE, _FOUR, _SIX = (_F(v) for v in (0, 1, 2, 3, 4, 6))
_WHITE = _F(255)
_STRETCH = _F((256 - 1e-3) / 255)  # torchvision's conversion from uint8 to [0, 1] and back
_STRIP = 1024  # pixels that are coloured together: their float32 channels stay in the first-level cache
_BLOCK = 1 << 15  # values whose squares add up to less than 2**32
_FRACTION = 32  # bits of the rotation's fixed-point coordinates
_HALF = _F(0.5)

# Without NaN and infinity among the values, comparisons become single instructions; sums keep their order.
_jit: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "ninf", "nsz", "contract"})


@_jit
def _triangle_weights(length, size, first, starts, counts, weights):
    """Write antialiased bilinear weights, as Pillow's and torch's, from `first` of `size` on: each row's sum is 1."""
    scale = length / size
    support = max(scale, 1.0)
    for i in range(len(starts)):
        centre = scale * (i + first + 0.5)
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), length)
        total = 0.0
        for k in range(high - low):
            distance = abs((k + low - centre + 0.5) / support)
            weight = 1.0 - distance if distance < 1.0 else 0.0
            weights[i, k] = weight
            total += weight
        for k in range(high - low):
            weights[i, k] = weights[i, k] / total
        starts[i], counts[i] = low, high - low


@_jit
def _resample_rows(source, top, left, width, starts, counts, weights, row, out, start, step):
    """Write weighted sums of source rows, rounded to uint8, to out[start + i * step :][: width]; widths in bytes."""
    for i in range(len(starts)):
        _weighted_row(source, top + starts[i], left, width, counts[i], weights[i], row)
        line = out[start + i * step : start + i * step + width]
        for x in range(width):
            line[x] = np.uint8(np.int32(row[x] + _HALF))


@_jit
def _resample_planes(planes, top, left, width, starts, counts, weights, row, out):
    """Write weighted sums of rows of three planes, rounded to uint8, as rows of 32-bit pixels."""
    red, green, blue = row[:width], row[width : 2 * width], row[2 * width : 3 * width]
    for i in range(len(starts)):
        for channel, sums in enumerate((red, green, blue)):
            _weighted_row(planes[channel], top + starts[i], left, width, counts[i], weights[i], sums)
        line = out[i * width : (i + 1) * width]
        for x in range(width):
            r, g, b = np.int32(red[x] + _HALF), np.int32(green[x] + _HALF), np.int32(blue[x] + _HALF)
            line[x] = np.uint32(r | g << np.int32(8) | b << np.int32(16))


@_jit
def _weighted_row(source, y, left, width, count, weights, row):
    """Return the weighted sum of `count` rows, four at a time: the sum stays in registers."""
    right = left + width
    done = 0
    while count - done >= 4:
        a, b = source[y + done, left:right], source[y + done + 1, left:right]
        c, d = source[y + done + 2, left:right], source[y + done + 3, left:right]
        wa, wb, wc, wd = weights[done], weights[done + 1], weights[done + 2], weights[done + 3]
        if done == 0:
            for x in range(width):
                row[x] = wa * _F(a[x]) + wb * _F(b[x]) + wc * _F(c[x]) + wd * _F(d[x])
        else:
            for x in range(width):
                row[x] += wa * _F(a[x]) + wb * _F(b[x]) + wc * _F(c[x]) + wd * _F(d[x])
        done += 4
    rest = count - done
    if rest == 0:
        return
    # One to three rows are left; a missing one counts with weight 0.
    a = source[y + done, left:right]
    b = source[y + done + min(1, rest - 1), left:right]
    c = source[y + done + rest - 1, left:right]
    wa = weights[done]
    wb = weights[done + 1] if rest > 1 else _ZERO
    wc = weights[done + 2] if rest > 2 else _ZERO
    if rest == 3:
        if done == 0:
            for x in range(width):
                row[x] = wa * _F(a[x]) + wb * _F(b[x]) + wc * _F(c[x])
        else:
            for x in range(width):
                row[x] += wa * _F(a[x]) + wb * _F(b[x]) + wc * _F(c[x])
    elif done == 0:
        for x in range(width):
            row[x] = wa * _F(a[x]) + wb * _F(b[x])
    else:
        for x in range(width):
            row[x] += wa * _F(a[x]) + wb * _F(b[x])


@intrinsic
def _turn_block(_context, source, at, stride, out, out_at, out_stride):
    """Transpose 8 × 8 32-bit values in registers, which no compiler finds by itself: a third of the time of loops.

    Three rounds of interleaving row i with row i + 4 turn the block.
    """

    def build(context, builder, signature, arguments):
        vector = ir.VectorType(ir.IntType(32), 8)
        source_type, _, _, out_type, _, _ = signature.args
        held = context.make_array(source_type)(context, builder, arguments[0]).data
        target = context.make_array(out_type)(context, builder, arguments[3]).data

        def pointer(data, start, step, number):
            index = builder.add(start, builder.mul(step, ir.Constant(start.type, number)))
            return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())

        rows = [builder.load(pointer(held, arguments[1], arguments[2], i), align=4) for i in range(8)]
        low, high = (
            ir.Constant(vector, [value for i in range(4) for value in (first + i, first + i + 8)]) for first in (0, 4)
        )
        for _ in range(3):
            rows = [builder.shuffle_vector(rows[i // 2], rows[i // 2 + 4], (low, high)[i % 2]) for i in range(8)]
        for i, row in enumerate(rows):
            builder.store(row, pointer(target, arguments[4], arguments[5], i), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, out, types.intp, types.intp), build


@intrinsic
def _pointer(_context, address):
    """Make a pointer of an address."""

    def build(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), build


@intrinsic
def _take_next(_context, taken):
    """Return the first number of an array, and add 1 to it, in one step among all threads."""

    def build(context, builder, signature, arguments):
        held = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", held, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(taken), build


@_jit
def _turn(source, out, height, width):
    """Transpose a picture of 32-bit pixels, block by block."""
    whole_height, whole_width = height - height % 8, width - width % 8
    for y in range(0, whole_height, 8):
        for x in range(0, whole_width, 8):
            _turn_block(source, y * width + x, width, out, x * height + y, height)
    for x in range(width):
        for y in range(whole_height if x < whole_width else 0, height):
            out[x * height + y] = source[y * width + x]


class FusedEngine:
    """Augments one image at a time on one core; one engine a thread.

    Args:
        augmentation: Size and largest angle; all other parameters come with the draws.
    """

    def __init__(self, augmentation: Augmentation) -> None:
        size = self.size = augmentation.size
        self._augmentation = augmentation
        # Distance that a corner is turned beyond the edge; without bounds checks the gather must find zeros there.
        angle = math.radians(min(augmentation.degrees, 45.0))
        self._margin = math.ceil((math.cos(angle) + math.sin(angle) - 1) * size / 2) + 2
        side = size + 2 * self._margin
        self._padded = np.zeros(side * side, np.uint32)
        self._spans = np.empty((4, size), np.int64)
        strip = size * max(1, _STRIP // size)
        self._line = np.empty(strip, np.uint32)
        self._rows = np.empty((3, strip), np.float32)
        self._figures = np.empty(2, np.float32)
        self._grow(width=1024, taps=16)

    def augment(self, pixels: UInt8Array, draws: Draws, first: int, out: UInt8Array, figures: Float32Array) -> None:
        """Make the variants of one image.

        Args:
            pixels: RGBX, shape (height, width, 4), C-contiguous.
            draws: Parameters; rows `first` to `first + K - 1` are this image's.
            first: See above.
            out: Receives the variants, shape (K, 3, size, size), RGB planes.
            figures: Receives mean and standard deviation of each variant's values, shape (K, 2), of 255.
        """
        height, width, channels = pixels.shape
        assert channels == 4, "the kernel takes RGBX"
        assert out.shape[1:] == (3, self.size, self.size), f"out has the shape {out.shape}"
        parameters = self.parameters(draws, first, first + len(out))
        _augment(pixels.reshape(height, width * 4), parameters, out, figures, self._scratch_for(height, width))

    def augment_stored(
        self, addresses: Int64Array, sides: tuple[int, int], taken: Int64Array, parameters: Any, out: UInt8Array
    ) -> None:
        """Make one variant of each of some pictures, together with other engines in other threads.

        Args:
            addresses: (n,) address of each picture's RGB planes, contiguous uint8 values.
            sides: Height and width of all of them.
            taken: (1,) number of pictures that some engine has begun with; 0 at first.
            parameters: `parameters` of their draws.
            out: Receives the variants, shape (n, 3, size, size), RGB planes.
        """
        assert out.shape == (len(addresses), 3, self.size, self.size), f"out has the shape {out.shape}"
        _augment_shared(addresses, *sides, taken, parameters, out, self._figures, self._scratch_for(*sides))

    def parameters(self, draws: Draws, first: int, end: int) -> tuple[AnyArray, ...]:
        """Return rows of draws as the compiled functions take them."""
        windows = [window(*sides, self._augmentation) for sides in draws.crop[first:end, 2:].tolist()]
        return (
            draws.crop[first:end],
            np.array(windows, np.int32).reshape(-1, 4),
            draws.flip[first:end],
            draws.angle[first:end],
            draws.jitter[first:end],
            draws.order[first:end],
        )

    def _scratch_for(self, height: int, width: int) -> tuple[Any, ...]:
        taps = 2 * math.ceil(max(height, width, self.size) / self.size) + 2
        most_width, most_taps = self._largest
        if width > most_width or taps > most_taps:
            self._grow(max(width, most_width), max(taps, most_taps))
        return self._scratch

    def _grow(self, width: int, taps: int) -> None:
        """Make buffers for images up to a width and a number of weights."""
        self._largest, size = (width, taps), self.size
        self._scratch = (
            self._padded,
            self._margin,
            self._spans,
            self._line,
            self._rows,
            np.empty(max(width, size) * 4, np.float32),  # one resampled row, RGBX
            np.empty(width * size * 4, np.uint8),  # resampled along y, (size, width, RGBX)
            np.empty(width * size * 4, np.uint8),  # the same, (width, size, RGBX)
            np.empty((size, taps), np.float32),  # weights along y
            np.empty((size, taps), np.float32),  # weights along x
        )


@_jit
def _augment(source, parameters, out, figures, scratch):
    """Make the variants of one picture of 32-bit pixels, (height, width · 4)."""
    for variant in range(len(out)):
        _make_variant(source, parameters, variant, out[variant], figures[variant], scratch)


@_jit
def _augment_shared(addresses, height, width, taken, parameters, out, figures, scratch):
    """Make one variant of each picture whose number no other thread has taken."""
    picture: Any = _take_next(taken)
    while picture < len(addresses):
        planes = numba.carray(_pointer(addresses[picture]), (3, height, width), np.uint8)
        _make_variant(planes, parameters, picture, out[picture], figures, scratch)
        picture = _take_next(taken)


@_jit
def _make_variant(source, parameters, variant, out, figures, scratch):
    crop, windows, flip, angle, jitter, order = parameters
    padded, margin, spans, line, rows, row, upright, turned, weights_y, weights_x = scratch
    size = out.shape[1]
    top, left, height, width = crop[variant]
    tall, wide, first_y, first_x = windows[variant]
    _triangle_weights(height, tall, first_y, spans[0], spans[1], weights_y)
    _triangle_weights(width, wide, first_x, spans[2], spans[3], weights_x)
    # Only the columns that are used: all, unless a window is taken.
    skipped = spans[2, 0]
    left, width = left + skipped, spans[2, size - 1] + spans[3, size - 1] - skipped
    for x in range(size):
        spans[2, x] -= skipped
    if source.ndim == 2:
        _resample_rows(source, top, left * 4, width * 4, spans[0], spans[1], weights_y, row, upright, 0, width * 4)
    else:
        _resample_planes(source, top, left, width, spans[0], spans[1], weights_y, row, upright.view(np.uint32))
    _turn(upright.view(np.uint32), turned.view(np.uint32), size, width)
    # The picture is turned in the padded buffer too: one of its rows is a column x.
    side = size + 2 * margin
    start, step = margin * side + margin, side
    if flip[variant]:
        start, step = start + (size - 1) * side, -side
    columns = turned[: width * size * 4].reshape(width, size * 4)
    _resample_rows(
        columns, 0, 0, size * 4, spans[2], spans[3], weights_x, row, padded.view(np.uint8), start * 4, step * 4
    )
    figures[0], figures[1] = _rotate_and_colour(
        padded, side, margin, angle[variant], jitter[variant], order[variant], line, rows, out.reshape(3, size * size)
    )


@_jit
def _rotate_and_colour(padded, side, margin, angle, jitter, order, line, rows, planes):
    """Gather rotated rows and colour them, a strip of rows at a time; return mean and deviation of all values."""
    pixels = planes.shape[1]
    size = int(math.sqrt(pixels))
    strip = len(line)
    gather = _rotation(size, margin, angle)
    _turn = 4
    for k in range(4):
        if order[k] == CONTRAST and jitter[CONTRAST] != _ONE:
            _turn = k
    grey = 0
    for start in range(0, pixels, strip):
        count = min(strip, pixels - start)
        red, green, blue = rows[0, :count], rows[1, :count], rows[2, :count]
        for done in range(0, count, size):
            _gather_row(padded, side, gather, (start + done) // size, line[done : done + size])
        for x in range(count):
            red[x] = _F(np.uint8(line[x]))
        for x in range(count):
            green[x] = _F(np.uint8(line[x] >> np.uint32(8)))
        for x in range(count):
            blue[x] = _F(np.uint8(line[x] >> np.uint32(16)))
        for k in range(_turn):
            _colour(order[k], jitter, red, green, blue)
        if _turn < 4:
            grey += _grey_sum(red, green, blue)
        _store(red, green, blue, planes, start)
    if _turn < 4:
        # Contrast needs the mean of the whole picture, so the strips are visited a second time.
        factor = jitter[CONTRAST]
        offset = _F(grey / pixels) * (_ONE - factor)
        for start in range(0, pixels, strip):
            count = min(strip, pixels - start)
            for channel in range(3):
                values, stored = rows[channel, :count], planes[channel, start : start + count]
                for x in range(count):
                    values[x] = _clipped(_F(stored[x]) * factor + offset)
            red, green, blue = rows[0, :count], rows[1, :count], rows[2, :count]
            for k in range(_turn + 1, 4):
                _colour(order[k], jitter, red, green, blue)
            _store(red, green, blue, planes, start)
    return _mean_and_deviation(planes)


@_jit
def _rotation(size, margin, angle):
    """Return fixed-point steps and start of the gather: source = R(angle) · (x, y) about the centre, to nearest."""
    radians = math.radians(angle)
    one = float(1 << _FRACTION)
    cosine, sine = math.cos(radians), math.sin(radians)
    half = (size - 1) / 2
    x0 = (-half * cosine + half * sine + half + margin + 0.5) * one
    y0 = (-half * sine - half * cosine + half + margin + 0.5) * one
    return int(x0), int(y0), int(round(cosine * one)), int(round(sine * one))


@_jit
def _gather_row(padded, side, gather, y, line):
    x0, y0, cosine, sine = gather
    x_at, y_at = x0 - y * sine, y0 + y * cosine
    for x in range(len(line)):
        line[x] = padded[np.uintp((x_at >> _FRACTION) * side + (y_at >> _FRACTION))]
        x_at += cosine
        y_at += sine


@_jit
def _clipped(value):
    """Return a value as uint8 stores it: within 0 and 255, without its fraction."""
    value = value if value < _WHITE else _WHITE
    value = value if value > _ZERO else _ZERO
    return _F(np.int32(value))


@_jit
def _grey(red, green, blue):
    return np.int32(_RED * red + _GREEN * green + _BLUE * blue)


@_jit
def _grey_sum(red, green, blue):
    total = 0
    for x in range(len(red)):
        total += _grey(red[x], green[x], blue[x])
    return total


@_jit
def _colour(operation, jitter, red, green, blue):
    factor = jitter[operation]
    if operation == BRIGHTNESS and factor != _ONE:
        for values in (red, green, blue):
            for x in range(len(values)):
                values[x] = _clipped(values[x] * factor)
    elif operation == SATURATION and factor != _ONE:
        rest = _ONE - factor
        for x in range(len(red)):
            offset = _F(_grey(red[x], green[x], blue[x])) * rest
            red[x] = _clipped(red[x] * factor + offset)
            green[x] = _clipped(green[x] * factor + offset)
            blue[x] = _clipped(blue[x] * factor + offset)
    elif operation == HUE and factor != _ZERO:
        _shift_hue(red, green, blue, factor * _SIX)


@_jit
def _shift_hue(red, green, blue, shift):
    """Convert RGB → HSV → RGB, the hue in sixths of a turn, without branches.

    With V the largest and C the span of the channels, a channel is V - C · (its hue distance, within 0 and 1).
    """
    for x in range(len(red)):
        r, g, b = red[x], green[x], blue[x]
        high = r if r > g else g
        high = high if high > b else b
        low = r if r < g else g
        low = low if low < b else b
        span = high - low
        inverse = _ONE / (span if span > _ZERO else _ONE)
        if_green, if_blue = (b - r) * inverse + _TWO, (r - g) * inverse + _FOUR
        hue = (g - b) * inverse if high == r else (if_green if high == g else if_blue)
        hue = hue + shift
        hue = hue + _SIX if hue < _ZERO else hue
        hue = hue - _SIX if hue >= _SIX else hue
        red[x] = _F(np.int32((high - span * _within(_TWO - abs(hue - _THREE))) * _STRETCH))
        green[x] = _F(np.int32((high - span * _within(abs(hue - _TWO) - _ONE)) * _STRETCH))
        blue[x] = _F(np.int32((high - span * _within(abs(hue - _FOUR) - _ONE)) * _STRETCH))


@_jit
def _within(value):
    """Clip a value to [0, 1]."""
    value = value if value < _ONE else _ONE
    return value if value > _ZERO else _ZERO


@_jit
def _store(red, green, blue, planes, start):
    for channel, values in enumerate((red, green, blue)):
        stored = planes[channel, start : start + len(values)]
        for x in range(len(values)):
            stored[x] = np.uint8(np.int32(values[x]))


@_jit
def _mean_and_deviation(planes):
    total, squares = 0, 0
    for channel in range(3):
        for start in range(0, planes.shape[1], _BLOCK):
            values = planes[channel, start : start + _BLOCK]
            few, many = np.uint32(0), np.uint32(0)  # 32-bit, so that more of them fit a register
            for x in range(len(values)):
                value = np.uint32(values[x])
                few = np.uint32(few + value)
                many = np.uint32(many + np.uint32(value * value))
            total += few
            squares += many
    mean = total / planes.size
    return mean, math.sqrt(max(squares / planes.size - mean * mean, 0.0))
