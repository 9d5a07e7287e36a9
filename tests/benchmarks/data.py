"""What benchmarks work on, written once and kept.

Transactions: `rows / 50` customers, 20,000 products, one year. Pictures: JPEGs in any number, with labels.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from tasks.images.decode import Decoded, Decoder
from tasks.images.sample import picture

PRODUCTS = 20_000
CATEGORIES = 40
FILE_ROWS = 1_250_000
START = np.datetime64("2025-01-01", "us")
_DAY = 86_400_000_000

CLASSES = 10
SYNTHETIC = 256
_COMMENT = b"\xff\xfe"


def transactions(directory: Path, rows: int) -> Path:
    """Directory of Parquet files with `rows` transactions; made unless it is there.

    Customers' and products' shares are heavy-tailed; 1 % of the amounts are refunds and 0.1 % are null or NaN.
    """
    target = directory / f"transactions-{rows}"
    done = target / "_done.json"
    if done.exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    draw = np.random.Generator(np.random.Philox(key=[7, 0]))
    shares = draw.pareto(1.5, max(1, rows // 50)) + 0.2
    customers = np.cumsum(shares) / shares.sum()
    weights = 1 / (np.arange(PRODUCTS) + 10) ** 0.8
    products = np.cumsum(weights) / weights.sum()
    price = draw.lognormal(2.5, 1, PRODUCTS)
    category = np.array([f"category-{i:02d}" for i in range(CATEGORIES)])[draw.integers(0, CATEGORIES, PRODUCTS)]
    for part, first in enumerate(range(0, rows, FILE_ROWS)):
        count = min(FILE_ROWS, rows - first)
        product = np.searchsorted(products, draw.random(count))
        amount = np.round(price[product] * draw.lognormal(0, 0.2, count), 2)
        amount[draw.random(count) < 0.01] *= -1
        amount[draw.random(count) < 0.0005] = np.nan
        table = pa.table(
            {
                "customer_id": np.searchsorted(customers, draw.random(count)),
                "product_id": product,
                "amount": pa.array(amount, mask=draw.random(count) < 0.0005),
                "timestamp": pa.array(START + (draw.random(count) * 365 * _DAY).astype("timedelta64[us]")),
                "category": pa.array(category[product]),
            }
        )
        pq.write_table(table, target / f"part-{part:03d}.parquet", row_group_size=FILE_ROWS // 2)
    done.write_text(json.dumps({"rows": rows}))
    return target


def originals(directory: Path | None) -> list[bytes]:
    """The JPEGs below a directory that every decoder can read as RGB; synthetic ones, if no directory is given.

    Raises:
        SystemExit: there are none.
    """
    if directory is None:
        return [_synthetic(number) for number in range(SYNTHETIC)]
    contents = [path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()]
    found = [data for data in contents if _is_plain_jpeg(data)]
    if not found:
        raise SystemExit(f"no JPEG is below {directory}; give a directory of photographs, or none")
    return found


def pictures(directory: Path, files: Sequence[bytes], count: int) -> Path:
    """Directory of `count` JPEGs in images/, the given ones in turns, and labels.csv; made unless it is there.

    Each file is of a size of its own, by a comment in it: copies to the byte would all be read and compared before
    anything is augmented, which happens to few files of a real collection. Those of one original are a scene in the
    labels, because near-duplicates that were found later would be moved to one split, nearly all of them. Scenes have
    10 classes.
    """
    digest = hashlib.blake2b(b"".join(hashlib.blake2b(data).digest() for data in files), digest_size=8).hexdigest()
    target = directory / f"pictures-{count}-{digest}"
    done = target / "_done.json"
    if done.exists():
        return target
    shutil.rmtree(target, ignore_errors=True)
    images = target / "images"
    images.mkdir(parents=True)
    labels = ["image_id,class_name,scene"]
    sizes: set[int] = set()
    for number in range(count):
        scene = number % len(files)
        data = _with_size_of_its_own(files[scene], sizes)
        (images / f"{number:06d}.jpg").write_bytes(data)
        labels.append(f"{number:06d},class-{scene % CLASSES},scene-{scene:06d}")
    (target / "labels.csv").write_text("\n".join(labels) + "\n")
    done.write_text(json.dumps({"pictures": count}))
    return target


def _synthetic(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(0, number)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _is_plain_jpeg(data: bytes) -> bool:
    decoded = Decoder(max_pixels=10**8, background=(255, 255, 255)).decode(data)
    if not isinstance(decoded, Decoded) or decoded.format != "JPEG":
        return False
    return simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "RGB", "Gray")


def _with_size_of_its_own(data: bytes, taken: set[int]) -> bytes:
    """The JPEG with the shortest comment that makes it as long as no other."""
    length = 0
    while (size := len(data) + 4 + length) in taken:
        length += 1
    assert length <= 65_533, "a comment has no more bytes"
    taken.add(size)
    return data[:2] + _COMMENT + (length + 2).to_bytes(2, "big") + b" " * length + data[2:]
