"""Large CSV files cut into pieces that tasks read in parallel, each from the start of a row.

Row starts can't be recognised in the middle of a file, as quoted text may hold line ends: so a file is scanned once
from its beginning, field by field by the rules of RFC 4180 and pyarrow, at some hundreds of megabytes a second.
Compressed files have no middle; they stay whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.io import storage

PIECE_BYTES = 64 * 2**20
"""Approximate bytes of a piece; a file of less than twice as much isn't cut."""

_BLOCK = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a CSV file.

    Attributes:
        header: bytes of the file's header, from its beginning.
        start: offset of the piece's first byte.
        end: offset behind its last one.
        rows: rows in it, including malformed ones.
        first_row: number of its first row in the file, from 0.
        lines: lines of the file between the header and the piece.
    """

    header: int
    start: int
    end: int
    rows: int
    first_row: int
    lines: int


def cut(info: storage.FileInfo) -> tuple[Piece, ...]:
    """Return the pieces of a CSV file; none if it is better read as a whole."""
    if info.bytes < 2 * PIECE_BYTES or info.uri.lower().endswith(".gz"):
        return ()
    from tasks.features.row_ends import START, follow  # numba: 0.7 s to import and load

    place = np.array(START, np.int64)
    ends: list[npt.NDArray[np.int64]] = []
    offset = 0
    with storage.open_input(info.uri) as stream:
        while block := stream.read(_BLOCK):
            found = np.empty((_BLOCK // PIECE_BYTES + 2, 3), np.int64)
            ends.append(found[: follow(np.frombuffer(block, np.uint8), offset, PIECE_BYTES, place, found)])
            offset += len(block)
    rows_end = [(int(end), int(rows), int(lines)) for end, rows, lines in np.concatenate(ends)]
    if not rows_end or rows_end[-1][0] == offset:
        rows_end = rows_end[:-1]
    if len(rows_end) < 2:
        return ()
    header = rows_end[0][0]
    total = int(place[2]) + (not place[1])
    bounds = [*rows_end, (offset, total, 0)]
    return tuple(
        Piece(header, start, end, after - before, before - 1, lines - rows_end[0][2])  # without the header's row
        for (start, before, lines), (end, after, _) in pairwise(bounds)
    )


class PieceText:
    """A piece as a separate file, with the header in front, to be read from the beginning."""

    def __init__(self, stream: pa.NativeFile, piece: Piece) -> None:
        self._stream, self._piece = stream, piece
        self._place = 0

    def read(self, size: int | None = None) -> bytes:
        """Return some bytes; none at the end."""
        header, start, end = self._piece.header, self._piece.start, self._piece.end
        if self._place == header < start:
            self._stream.seek(start)
            self._place = start
        stop = header if self._place < header else end
        left = stop - self._place
        data: bytes = self._stream.read(left if size is None else min(size, left))
        self._place += len(data)
        if size is None and stop == header:
            return data + self.read()
        return data

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
