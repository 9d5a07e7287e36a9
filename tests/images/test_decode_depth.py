"""Gray of any depth: what a file declares to be black becomes 0, what it declares to be white 255."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tests.images.test_decode import encoded, pixels_of, png

Tags = Mapping[int, int | tuple[float, ...]]


def tiff(tags: Tags, *parts: bytes, order: str = "<") -> bytes:
    """A TIFF by hand, also one that Pillow can't write: its first directory, then the strips.

    Args:
        tags: Values of more tags or others than those of an 8-bit gray picture of one strip; floats are doubles.
        parts: The strips, one after the other.
        order: "<" for Intel's, ">" for Motorola's order of bytes.
    """
    lengths = tuple(map(len, parts))
    tags = {258: 8, 259: 1, 262: 1, 277: 1, 279: lengths, **tags}
    values: dict[int, tuple[float, ...]] = {
        tag: value if isinstance(value, tuple) else (value,) for tag, value in tags.items()
    }
    ends = 8 + 2 + 12 * (len(values) + (273 not in values)) + 4
    kinds = {tag: "d" if any(isinstance(value, float) for value in value) else "I" for tag, value in values.items()}
    further = sum(struct.calcsize(f"{len(value)}{kinds[tag]}") for tag, value in values.items() if tag != 273)
    start = ends + further + 4 * len(parts)
    values.setdefault(273, tuple(start + sum(lengths[:number]) for number in range(len(parts))))
    directory, beyond = struct.pack(f"{order}2sHIH", b"MM" if order == ">" else b"II", 42, 8, len(values)), b""
    for tag, value in sorted(values.items()):
        kind = kinds.get(tag, "I")
        body = struct.pack(f"{order}{len(value)}{kind}", *value)
        directory += struct.pack(f"{order}HHI", tag, 12 if kind == "d" else 4, len(value))
        if len(body) > 4:
            directory += struct.pack(f"{order}I", ends + len(beyond))
            beyond += body
        else:
            directory += body
    return (directory + bytes(4) + beyond).ljust(start, b"\0") + b"".join(parts)


def gray_of(data: bytes) -> list[int]:
    """The first row of what must be gray."""
    row = pixels_of(data)[0]
    assert (row == row[:, :1]).all()
    return [int(value) for value in row[:, 0]]


def ramp(dtype: str, order: str = "<") -> tuple[npt.NDArray[np.generic], list[int]]:
    """257 values over the whole range of a type, and what they are in 8 bits."""
    limits = np.iinfo(dtype)
    values = [int(limits.min) + (int(limits.max) - int(limits.min)) * step // 256 for step in range(257)]
    want = [round((value - int(limits.min)) * 255 / (int(limits.max) - int(limits.min))) for value in values]
    return np.array(values, np.dtype(dtype).newbyteorder(order)), want


@pytest.mark.parametrize(
    ("dtype", "order", "white_is_zero"),
    [
        ("u2", "<", False),
        ("u2", ">", False),
        ("u2", "<", True),
        ("i2", "<", False),
        ("i2", ">", False),
        ("u4", "<", False),
        ("i4", "<", False),
        ("i4", ">", False),
    ],
)
@pytest.mark.parametrize("compression", [1, 8])
def test_the_whole_range_of_a_tiff_becomes_0_to_255(
    dtype: str, order: str, white_is_zero: bool, compression: int
) -> None:
    values, want = ramp(dtype, order)
    tags: Tags = {
        256: 257,
        257: 1,
        258: values.itemsize * 8,
        259: compression,
        262: int(not white_is_zero),
        339: 2 if dtype[0] == "i" else 1,
    }
    body = zlib.compress(values.tobytes()) if compression == 8 else values.tobytes()
    assert gray_of(tiff(tags, body, order=order)) == ([255 - value for value in want] if white_is_zero else want)


def test_12_bits_of_a_tiff() -> None:
    values = [0, 1, 2048, 4094, 4095, 16]
    packed = bytes.fromhex("".join(f"{value:03x}" for value in values))
    assert gray_of(tiff({256: 6, 257: 1, 258: 12}, packed)) == [round(value * 255 / 4095) for value in values]


def test_a_range_of_which_little_is_used_is_dark() -> None:
    values = np.array([0, 300, 65535, 2**24], "<u4")
    assert gray_of(tiff({256: 4, 257: 1, 258: 32}, values.tobytes())) == [0, 0, 0, 1]


def test_32_bits_with_a_sign_may_be_16_bits_that_pillow_wrote() -> None:
    values = np.array([[0, 257, 65534, 65535]], dtype=np.int32)
    assert gray_of(encoded(Image.fromarray(values), "TIFF")) == [0, 1, 255, 255]
    values[0, 0] = -1
    assert gray_of(encoded(Image.fromarray(values), "TIFF")) == [127, 128, 128, 128]


FLOATS = [0.0, 0.25, 1.0]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize(
    ("tags", "want"),
    [
        ({}, [0, 64, 255]),
        ({262: 0}, [255, 191, 0]),
        ({340: (-1.0,), 341: (1.0,)}, [128, 159, 255]),  # the range is declared
        ({340: (0.0,), 341: (4.0,)}, [0, 16, 64]),
        ({340: (0.0,), 341: (4.0,), 262: 0}, [255, 239, 191]),
        ({340: (1.0,), 341: (1.0,)}, [0, 64, 255]),  # it is none
        ({340: (0.0,), 341: (float("nan"),)}, [0, 64, 255]),
    ],
)
def test_floats_of_a_tiff(
    tags: dict[int, int | tuple[float, ...]], want: list[int], order: str, compression: int
) -> None:
    body = np.array(FLOATS, f"{order}f4").tobytes()
    tags = {256: 3, 257: 1, 258: 32, 259: compression, 339: 3, **tags}
    assert gray_of(tiff(tags, zlib.compress(body) if compression == 8 else body, order=order)) == want


@pytest.mark.parametrize("greatest", [1, 15, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("plain", [True, False])
def test_the_greatest_value_of_a_pgm_is_white(greatest: int, plain: bool) -> None:
    values = [0, greatest // 3, greatest - 1, greatest]
    body = (
        " ".join(map(str, values)).encode() if plain else np.array(values, ">u2" if greatest > 255 else "u1").tobytes()
    )
    found = gray_of(f"P{2 if plain else 5} 4 1 {greatest}\n".encode() + body)
    assert found == [int(value * 255 / greatest + 0.5) for value in values]


@pytest.mark.parametrize("significant", [None, 4, 12])
def test_the_significant_bits_of_a_png_are_no_range(significant: int | None) -> None:
    row = np.array([0, 257, 32_768, 65_535], ">u2").tobytes()
    chunks = [] if significant is None else [(b"sBIT", bytes([significant]))]
    assert gray_of(png(4, 1, 16, 0, b"\0" + row, *chunks)) == [0, 1, 128, 255]


def test_16_bits_of_a_fits_file_have_a_sign() -> None:
    cards = ["SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 3", "NAXIS2  = 1", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    body = np.array([-32768, 0, 32767], ">i2").tobytes()
    assert gray_of(header + body.ljust(2880, b"\0")) == [0, 128, 255]


# Packets of 5 × 1 samples without loss (0, 1, half, white - 1, white), by OpenJPEG: Pillow writes none of these depths.
PACKETS = {
    4: "df2040066cb59e",
    12: "dfe020066cb59cabd6c455",
    16: "dff89050066cb59cabd6c459db1f",
}
WANT = {4: [0, 17, 136, 238, 255], 12: [0, 0, 128, 255, 255], 16: [0, 0, 128, 255, 255]}
OPAQUE = "cffc30080282"


def j2k(bits: int, has_sign: bool, *packets: str) -> bytes:
    """A codestream of JPEG 2000 of 5 × 1 pixels, with a packet for each component."""
    depth = bytes([bits - 1 | 0x80 * has_sign, 1, 1])
    size = struct.pack(">H8IH", 0, 5, 1, 0, 0, 5, 1, 0, 0, len(packets)) + depth * len(packets)
    head = b"\xff\x4f\xff\x51" + struct.pack(">H", 2 + len(size)) + size
    head += bytes.fromhex("ff52000c00000001000004040001 ff5c000440") + bytes([bits << 3])
    tile = bytes.fromhex("ff93" + "".join(packets))
    return head + struct.pack(">HHHIBB", 0xFF90, 10, 0, 12 + len(tile), 0, 1) + tile + b"\xff\xd9"


@pytest.mark.parametrize("has_sign", [False, True])
@pytest.mark.parametrize(("bits", "components"), [(4, 1), (4, 3), (12, 1), (12, 3), (16, 1), (16, 2), (16, 3), (16, 4)])
def test_white_is_white_at_any_depth_of_a_jpeg_2000(bits: int, components: int, has_sign: bool) -> None:
    """With a sign, half of the samples are below zero."""
    packets = [PACKETS[bits]] * components
    if components in (2, 4):
        packets[-1] = OPAQUE
    assert gray_of(j2k(bits, has_sign, *packets)) == WANT[bits]
