"""Ends of the rows of a CSV file: followed field by field, compiled by numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

_FIELD, _TEXT, _QUOTED, _QUOTE = range(4)  # at the start of a field, within one, within quotes, after a quote within
_LINE_FEED, _RETURN, _MARK, _COMMA = b'\n\r",'

START = (_FIELD, 1, 0, 0, 0)
"""The place before a file's first byte, see `follow`."""


@numba.njit(nogil=True, cache=True, error_model="numpy")
def follow(
    text: npt.NDArray[np.uint8],
    offset: int,
    piece: int,
    place: npt.NDArray[np.int64],
    found: npt.NDArray[np.int64],
) -> Any:
    """Follow some text from a place on, and record the ends of rows at which pieces may end; return their number.

    Args:
        text: The text.
        offset: Its offset in the file.
        piece: Bytes of a piece.
        place: (5,): state, whether the line is blank so far, rows and lines that have ended, and the offset from which
            on the end of a row is wanted; at first `START`, changed to the end of the text.
        found: Array for the ends, (n, 3): offset after the end of the row, rows and lines up to there.

    """
    state, blank, rows, lines, wanted = place[0], place[1], place[2], place[3], place[4]
    count = 0
    for at in range(len(text)):
        sign = text[at]
        if sign == _LINE_FEED:
            lines += 1
        if state == _QUOTED:
            if sign == _MARK:
                state = _QUOTE
            continue
        if state == _QUOTE and sign == _MARK:
            state = _QUOTED
            continue
        if sign in (_LINE_FEED, _RETURN):
            if not blank:
                rows += 1
            blank, state = 1, _FIELD
            if sign == _LINE_FEED and rows and offset + at + 1 >= wanted:
                found[count, 0], found[count, 1], found[count, 2] = offset + at + 1, rows, lines
                count += 1
                # The first is the header's; pieces begin after it.
                wanted = offset + at + 1 + piece
            continue
        blank = 0
        if sign == _COMMA:
            state = _FIELD
        elif sign == _MARK and state == _FIELD:
            state = _QUOTED
        else:
            state = _TEXT
    place[0], place[1], place[2], place[3], place[4] = state, blank, rows, lines, wanted
    return count
