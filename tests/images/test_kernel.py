"""The compiled kernel against torchvision with the same drawn parameters, operation by operation and as a whole.

Tolerances. Resampling rounds in another order, so a value may be one level off; nothing is off by two. A rotation's
coordinates are exact here and float32 there, so a few pixels in a million that lie half-way go to the neighbour.
Colour operations on equal input are at most one level off, hue in few places more, where a level's difference turns
into another sixth of the circle. The whole: at least 45 dB on natural-looking pictures.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from tasks.images.config import Augmentation, Centred, ImageAugmentationConfig, Original
from tasks.images.draws import Draws, draw, image_keys
from tasks.images.engines import measure
from tasks.images.kernel import FusedEngine
from tasks.images.transforms import TorchEngine
from tasks.io.tensors import UInt8Array
from tests.images.oracle import reference_variant

NEUTRAL = (1.0, 1.0, 1.0, 0.0)
IN_ORDER = (0, 1, 2, 3)


def natural(height: int, width: int, seed: int = 0) -> UInt8Array:
    """Smooth colours with some noise and edges: RGBX, with a fourth channel that must not matter."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [
        np.sin(x * rng.uniform(2, 12) + y * rng.uniform(2, 12) + rng.uniform(0, 6)) * 80 + rng.uniform(60, 190)
        for _ in range(3)
    ]
    picture = np.stack(waves, axis=2) + rng.normal(0, 4, (height, width, 1))
    picture[((x * 7).astype(int) + (y * 7).astype(int)) % 5 == 0] += 40
    rgb = np.clip(picture, 0, 255).astype(np.uint8)
    return np.dstack([rgb, rng.integers(0, 256, (height, width), dtype=np.uint8)])


def drawn(
    crop: tuple[int, int, int, int],
    flip: bool = False,
    angle: float = 0.0,
    jitter: tuple[float, float, float, float] = NEUTRAL,
    order: tuple[int, ...] = IN_ORDER,
) -> Draws:
    return Draws(
        crop=np.array([crop], np.int32),
        flip=np.array([flip]),
        angle=np.array([angle], np.float32),
        jitter=np.array([jitter], np.float32),
        order=np.array([order], np.uint8),
    )


@pytest.mark.parametrize("shape", [(300, 200), (57, 213), (16, 16), (9, 30), (40, 41), (20, 500)])
@pytest.mark.parametrize("size", [16, 56])
@pytest.mark.parametrize(("split", "variants"), [("validation", 3), ("validation", 0), ("train", 0)])
def test_the_middle_is_torchvisions(shape: tuple[int, int], size: int, split: str, variants: int) -> None:
    """By both engines; of very long images the middle is cut out before."""
    config = ImageAugmentationConfig(augmentation=Augmentation(size=size, variants=variants)).of_split(split)
    side = round(size * 256 / 224) if variants else size
    assert config.augmentation.variants == 1
    pixels = natural(*shape)
    draws = draw(image_keys(["any"], 0), np.array(shape[:1]), np.array(shape[1:]), config.augmentation)
    out, figures = np.empty((1, 3, size, size), np.uint8), np.empty((1, 2), np.float32)
    FusedEngine(config.augmentation).augment(pixels, draws, 0, out, figures)
    by_torch = TorchEngine(config.augmentation).apply([pixels], draws)
    top, left, height, width = draws.crop[0].tolist()
    assert (height, width) == shape or max(shape) > 4 * min(shape)
    tensor = torch.from_numpy(pixels[top : top + height, left : left + width, :3].copy()).permute(2, 0, 1)
    wanted = v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(size)])(tensor).numpy()
    assert np.array_equal(by_torch[0], wanted)
    assert np.abs(out[0].astype(int) - wanted).max() <= 1
    assert figures[0, 0] == pytest.approx(out.mean(), abs=0.01)


@pytest.mark.parametrize("shape", [(300, 200), (57, 213), (32, 33), (20, 500)])
def test_the_middle_of_a_stored_original_is_that_of_the_image(shape: tuple[int, int]) -> None:
    def made(pixels: UInt8Array, augmentation: Augmentation) -> UInt8Array:
        sides = np.array(pixels.shape[:1]), np.array(pixels.shape[1:2])
        out = np.zeros((1, 3, augmentation.size, augmentation.size), np.uint8)
        draws = draw(image_keys(["any"], 0), *sides, augmentation)
        FusedEngine(augmentation).augment(pixels, draws, 0, out, np.empty((1, 2), np.float32))
        return out[0]

    pixels, centred = natural(*shape), Centred(size=28, variants=1, degrees=0)
    stored = np.zeros((32, 32, 4), np.uint8)
    stored[:, :, :3] = made(pixels, Original(size=32, variants=1, degrees=0)).transpose(1, 2, 0)
    assert np.array_equal(made(stored, centred), made(pixels, centred))


def run(pixels: UInt8Array, draws: Draws, size: int, degrees: float = 15.0) -> UInt8Array:
    """All rows of the draws as variants of one image."""
    engine = FusedEngine(Augmentation(size=size, degrees=degrees))
    count = len(draws.crop)
    out = np.empty((count, 3, size, size), np.uint8)
    figures = np.empty((count, 2), np.float32)
    engine.augment(pixels, draws, 0, out, figures)
    measured = measure(out)
    np.testing.assert_allclose(figures[:, 0], measured.mean, atol=1e-3)
    np.testing.assert_allclose(figures[:, 1], measured.std, atol=1e-3)
    return out


def psnr(a: UInt8Array, b: UInt8Array) -> float:
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def gaps(a: UInt8Array, b: UInt8Array) -> npt.NDArray[np.int64]:
    return np.abs(a.astype(np.int64) - b)


@pytest.mark.parametrize(
    ("height", "width", "crop", "size"),
    [
        (375, 500, (20, 30, 300, 400), 224),  # smaller, both ways
        (375, 500, (0, 0, 375, 500), 224),  # the whole picture
        (100, 120, (5, 7, 60, 70), 224),  # larger, both ways
        (375, 90, (10, 0, 350, 80), 128),  # smaller one way, larger the other
        (64, 64, (0, 0, 64, 64), 64),  # as it is
        (9, 7, (0, 0, 9, 7), 16),
        (1, 1, (0, 0, 1, 1), 8),
        (3000, 2, (0, 0, 3000, 2), 8),  # hundreds of taps one way
        (2, 3000, (0, 17, 1, 2900), 9),
        (50, 60, (49, 59, 1, 1), 11),  # the last pixel
        (301, 203, (7, 5, 211, 187), 37),  # blocks of eight don't divide it
    ],
)
def test_a_crop_is_resampled_to_within_a_level(
    height: int, width: int, crop: tuple[int, int, int, int], size: int
) -> None:
    pixels = natural(height, width)
    draws = drawn(crop)
    gap = gaps(run(pixels, draws, size)[0], reference_variant(pixels, draws, 0, size))
    assert gap.max() <= 1
    assert gap.mean() < 0.3


def test_an_image_that_has_the_size_already_stays_as_it_is() -> None:
    pixels = natural(96, 96)
    made = run(pixels, drawn((0, 0, 96, 96)), 96)[0]
    np.testing.assert_array_equal(made, np.moveaxis(pixels[:, :, :3], 2, 0))


def test_a_flip_mirrors_left_and_right() -> None:
    pixels = natural(200, 300)
    crop = (11, 12, 170, 250)
    plain, flipped = (run(pixels, drawn(crop, flip=flip), 64)[0] for flip in (False, True))
    np.testing.assert_array_equal(flipped, plain[:, :, ::-1])


@pytest.mark.parametrize("angle", [7.3, -14.9, 0.01, 45.0, -133.7, 179.0, 90.0, 180.0, -90.0])
@pytest.mark.parametrize("size", [64, 65])
def test_a_rotation_takes_the_same_pixels(angle: float, size: int) -> None:
    pixels = natural(size, size)  # as large as the result, so that nothing is resampled
    draws = drawn((0, 0, size, size), angle=angle)
    gap = gaps(run(pixels, draws, size, degrees=180)[0], reference_variant(pixels, draws, 0, size))
    assert np.mean(gap.max(axis=0) > 0) < 2e-3


def test_corners_that_a_rotation_leaves_open_are_black() -> None:
    made = run(np.full((80, 80, 4), 200, np.uint8), drawn((0, 0, 80, 80), angle=15), 80)[0]
    assert (made[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()
    assert set(np.unique(made)) == {0, 200}


def every_colour() -> UInt8Array:
    """A picture in which each channel takes its values in combination with the others', and all greys."""
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    r, g, b = (a.ravel() for a in np.meshgrid(levels, levels, levels, indexing="ij"))
    flat = np.stack([r, g, b, np.zeros_like(r)], axis=1)
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4, axis=1)
    flat = np.concatenate([flat, greys])
    side = math.ceil(math.sqrt(len(flat)))
    return np.resize(flat, (side * side, 4)).reshape(side, side, 4)


@pytest.mark.parametrize(
    ("jitter", "most"),
    [
        ((0.8, 1, 1, 0), 0),
        ((1.2, 1, 1, 0), 0),
        ((0.0, 1, 1, 0), 0),
        ((1, 0.8, 1, 0), 1),  # the mean is summed in another order
        ((1, 1.7, 1, 0), 1),
        ((1, 1, 0.8, 0), 1),  # 0.2989 r + 0.587 g + 0.114 b may fall to either side of a whole number
        ((1, 1, 1.9, 0), 1),
        ((1, 1, 0.0, 0), 1),
        ((1, 1, 1, 0.1), 1),
        ((1, 1, 1, -0.1), 1),
        ((1, 1, 1, 0.5), 1),
        ((1, 1, 1, -0.5), 1),
    ],
)
def test_each_colour_operation_over_the_whole_cube(jitter: tuple[float, float, float, float], most: int) -> None:
    pixels = every_colour()
    size = len(pixels)
    draws = drawn((0, 0, size, size), jitter=jitter)
    gap = gaps(run(pixels, draws, size)[0], reference_variant(pixels, draws, 0, size))
    assert gap.max() <= most
    assert np.mean(gap > 0) < 0.02


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1), (0, 2, 3, 1)])
def test_colour_operations_are_applied_in_their_order(order: tuple[int, ...]) -> None:
    pixels = natural(128, 128)
    draws = drawn((0, 0, 128, 128), jitter=(1.2, 0.7, 1.4, 0.1), order=order)
    made, wanted = run(pixels, draws, 128)[0], reference_variant(pixels, draws, 0, 128)
    assert gaps(made, wanted).mean() < 0.1
    assert psnr(made, wanted) > 50


@pytest.mark.parametrize("size", [224, 96, 33])
def test_whole_variants_equal_torchvisions(size: int) -> None:
    augmentation = Augmentation(size=size, variants=4)
    engine = FusedEngine(augmentation)
    figures = np.empty((4, 2), np.float32)
    out = np.empty((4, 3, size, size), np.uint8)
    found = []
    for number, (height, width) in enumerate([(375, 500), (500, 333), (180, 240), (1000, 700), (60, 45)]):
        pixels = natural(height, width, number)
        draws = draw(image_keys([f"image-{number}"], 0), np.array([height]), np.array([width]), augmentation)
        engine.augment(pixels, draws, 0, out, figures)
        found += [psnr(out[row], reference_variant(pixels, draws, row, size)) for row in range(4)]
    assert min(found) > 42
    assert np.median(found) > 50


@settings(max_examples=60)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.sampled_from([8, 9, 16, 31]),
    seed=st.integers(0, 2**32),
    degrees=st.sampled_from([0.0, 15.0, 180.0]),
)
def test_any_image_any_draw(height: int, width: int, size: int, seed: int, degrees: float) -> None:
    augmentation = Augmentation(size=size, variants=2, degrees=degrees, brightness=0.5, contrast=0.5, saturation=0.5)
    pixels = natural(height, width, seed)
    draws = draw(image_keys(["x"], seed), np.array([height]), np.array([width]), augmentation)
    made = run(pixels, draws, size, degrees)
    again = run(pixels, draws, size, degrees)
    np.testing.assert_array_equal(made, again)
    for row in range(2):
        gap = gaps(made[row], reference_variant(pixels, draws, row, size))
        # A pixel half-way between two others may be its neighbour; a small picture has few pixels to hide it.
        assert np.mean(gap > 6) < 0.05


def test_an_engine_remembers_nothing_of_earlier_images() -> None:
    augmentation = Augmentation(size=40, variants=1)
    engine = FusedEngine(augmentation)
    out, figures = np.empty((1, 3, 40, 40), np.uint8), np.empty((1, 2), np.float32)
    for height, width in [(30, 2000), (900, 3000), (4000, 20), (50, 50), (1, 1)]:  # buffers grow on the way
        pixels = natural(height, width)
        draws = draw(image_keys([f"{height}"], 1), np.array([height]), np.array([width]), augmentation)
        engine.augment(pixels, draws, 0, out, figures)
        np.testing.assert_array_equal(out, run(pixels, draws, 40))


@pytest.mark.parametrize("kind", [Augmentation, Centred])
@pytest.mark.parametrize(("height", "width"), [(60, 45), (30, 2000), (700, 33)])
@pytest.mark.parametrize("threads", [1, 3])
def test_planes_give_the_pixels_of_the_picture_whichever_thread_takes_it(
    kind: type[Augmentation], height: int, width: int, threads: int
) -> None:
    count, augmentation = 7, kind(size=40, variants=1, degrees=15.0)
    pictures = [natural(height, width, number) for number in range(count)]
    planes = np.ascontiguousarray(np.stack(pictures)[..., :3].transpose(0, 3, 1, 2))
    keys = image_keys([f"image-{number}" for number in range(count)], 3)
    draws = draw(keys, np.full(count, height), np.full(count, width), augmentation)
    addresses = planes.ctypes.data + planes.strides[0] * np.arange(count)
    out, taken = np.zeros((count, 3, 40, 40), np.uint8), np.zeros(1, np.int64)
    engines = [FusedEngine(augmentation) for _ in range(threads)]
    parameters = engines[0].parameters(draws, 0, count)
    with ThreadPoolExecutor(threads) as pool:
        work = [
            pool.submit(engine.augment_stored, addresses, (height, width), taken, parameters, out) for engine in engines
        ]
        for one in work:
            one.result()
    assert taken[0] == count + threads
    alone, figures = np.empty((1, 3, 40, 40), np.uint8), np.empty((1, 2), np.float32)
    for number, picture in enumerate(pictures):
        engines[0].augment(picture, draws, number, alone, figures)
        np.testing.assert_array_equal(out[number], alone[0])


def test_the_fourth_channel_doesnt_matter() -> None:
    pixels = natural(120, 150)
    draws = drawn((3, 4, 100, 120), flip=True, angle=10, jitter=(1.1, 0.9, 1.2, 0.05))
    other = pixels.copy()
    other[:, :, 3] = 255 - other[:, :, 3]
    np.testing.assert_array_equal(run(pixels, draws, 64), run(other, draws, 64))
