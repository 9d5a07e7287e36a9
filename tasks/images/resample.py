"""Antialiased resampling along one axis, and transposing a picture for the other axis; compiled by numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

F = np.float32
ZERO, HALF = F(0), F(0.5)

# Without NaN and infinity among the values, comparisons become single instructions; sums keep their order.
jit: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "ninf", "nsz", "contract"})


@jit
def triangle_weights(length, size, first, starts, counts, weights):
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


@jit
def resample_rows(source, top, left, width, starts, counts, weights, row, out, start, step):
    """Write weighted sums of source rows, rounded to uint8, to out[start + i * step :][: width]; widths in bytes."""
    for i in range(len(starts)):
        _weighted_row(source, top + starts[i], left, width, counts[i], weights[i], row)
        line = out[start + i * step : start + i * step + width]
        for x in range(width):
            line[x] = np.uint8(np.int32(row[x] + HALF))


@jit
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
                row[x] = wa * F(a[x]) + wb * F(b[x]) + wc * F(c[x]) + wd * F(d[x])
        else:
            for x in range(width):
                row[x] += wa * F(a[x]) + wb * F(b[x]) + wc * F(c[x]) + wd * F(d[x])
        done += 4
    rest = count - done
    if rest == 0:
        return
    # One to three rows are left; a missing one counts with weight 0.
    a = source[y + done, left:right]
    b = source[y + done + min(1, rest - 1), left:right]
    c = source[y + done + rest - 1, left:right]
    wa = weights[done]
    wb = weights[done + 1] if rest > 1 else ZERO
    wc = weights[done + 2] if rest > 2 else ZERO
    if rest == 3:
        if done == 0:
            for x in range(width):
                row[x] = wa * F(a[x]) + wb * F(b[x]) + wc * F(c[x])
        else:
            for x in range(width):
                row[x] += wa * F(a[x]) + wb * F(b[x]) + wc * F(c[x])
    elif done == 0:
        for x in range(width):
            row[x] = wa * F(a[x]) + wb * F(b[x])
    else:
        for x in range(width):
            row[x] += wa * F(a[x]) + wb * F(b[x])


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


@jit
def turn(source, out, height, width):
    """Transpose a picture of 32-bit pixels, block by block."""
    whole_height, whole_width = height - height % 8, width - width % 8
    for y in range(0, whole_height, 8):
        for x in range(0, whole_width, 8):
            _turn_block(source, y * width + x, width, out, x * height + y, height)
    for x in range(width):
        for y in range(whole_height if x < whole_width else 0, height):
            out[x * height + y] = source[y * width + x]
