"""The torch engines: drawn parameters applied by torchvision's operations on any device, and users' policies.

`TorchEngine` equals `torchvision.transforms.v2.functional` for the same parameters, on uint8 tensors. A GPU
mostly waits if each variant brings its sixty small operations separately, so only the crops are resized
one by one (each has another size); all that follows works on many variants at once.

The colour operations work on many uint8 images at once, each with a separate factor, where torchvision's functions take
one factor for a whole batch. They take images of (n, 3, height, width) and factors of (n, 1, 1, 1), float32, and follow
`torchvision/transforms/v2/functional/_color.py` (0.29) step by step, with the same rounding. Results don't depend on
the batch.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.images.config import Augmentation
from tasks.images.draws import Draws, policy_seeds, window
from tasks.io.errors import ConfigError
from tasks.io.tensors import AnyArray, BoolArray, Float32Array, UInt8Array, UInt64Array
from tasks.store.settings import load_object

if TYPE_CHECKING:
    from torch import Tensor


_EXACT_SUM = 2**24  # sums of integers up to here are exact in float32, in any order


def _brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend images with black, or away from it."""
    return _bytes(images * factors)


def _contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend images with their mean luma, or away from it."""
    import torch

    luma = _luma(images)
    if luma[0].numel() * 255 <= _EXACT_SUM:
        mean = luma.mean(dim=(1, 2, 3), keepdim=True)
    else:  # a sum's rounding depends on its order, which depends on the batch
        mean = torch.cat([one.mean(dim=(1, 2, 3), keepdim=True) for one in torch.split(luma, 1)])
    return _blend(images, mean, factors)


def _saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend images with the luma of each pixel, or away from it."""
    return _blend(images, _luma(images), factors)


def _hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Shift the hue of HSV; step by step as torchvision, whose conversions are Pillow's."""
    import torch

    rgb = images.float().mul_(1 / 255)
    red, green, _ = rgb.unbind(dim=1)
    low, high = torch.aminmax(rgb, dim=1)
    grey, span = high == low, high - low
    share = span / torch.where(grey, 1.0, high)
    from_high = (high.unsqueeze(1) - rgb) / torch.where(grey, 1.0, span).unsqueeze(1)
    to_red, to_green, to_blue = from_high.unbind(dim=1)
    sixths = torch.where(
        high == red,
        to_blue - to_green,
        torch.where(high == green, to_red + 2.0 - to_blue, to_green + 4.0 - to_red),
    )
    circle = sixths.mul_(1 / 6).add_(1.0).fmod_(1.0).add_(shifts[:, 0]).remainder_(1.0).mul_(6)
    sector = circle.floor()
    fraction = share * circle.sub_(sector)
    without = 1.0 - share
    falling = (1.0 - fraction).mul_(high).clamp_(0.0, 1.0)
    rising = fraction.add_(without).mul_(high).clamp_(0.0, 1.0)
    lowest = without.mul_(high).clamp_(0.0, 1.0)
    choices = torch.stack((high, lowest, falling, rising), dim=1)
    # Components for red, green and blue in each sixth of the circle.
    parts = torch.tensor([[0, 2, 1, 1, 3, 0], [3, 0, 0, 2, 1, 1], [1, 1, 3, 0, 0, 2]], device=images.device)
    turned = choices.gather(1, parts[:, sector.to(torch.int32).remainder_(6)].movedim(0, 1))
    return turned.mul_(256 - 1e-3).to(torch.uint8)


def _luma(images: Tensor) -> Tensor:
    """Return whole levels as float32, (n, 1, height, width); weights of ITU-R BT.601."""
    red, green, blue = images.unbind(dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(1)


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    """Mix images · factor + others · (1 - factor); the second product isn't rounded before the sum.

    torch fuses that step for a single factor but not for a tensor of them. In float64 the product is exact.
    """
    rest = (1 - factors.double()).float().double()
    return _bytes((images * factors).double().add_(others.double() * rest).float())


def _bytes(values: Tensor) -> Tensor:
    import torch

    return values.clamp_(0, 255).to(torch.uint8)


# Pixels of the variants that are processed together: on a GPU enough to keep it busy, on a CPU its cache's size.
_PIXELS_AT_ONCE = {"cuda": 1 << 22, "cpu": 1 << 18}
# torch's antialiasing on CUDA keeps its weights in shared memory, which is too small from about 60 : 1 on
# (pytorch/vision issue 7671).
_STEEPEST_ON_GPU = 32


class TorchEngine:
    """Engine that augments images with torch on one device; loaded once per worker.

    The results on a CPU equal torchvision's functions bit by bit, for any batch. On a GPU resizing is
    done in float32 where CPUs use 16-bit weights, so a pixel may be a level off before the colour operations.
    """

    def __init__(self, augmentation: Augmentation, device: str = "cpu") -> None:
        """Load torch.

        Raises:
            ConfigError: the device doesn't exist.
        """
        import torch

        self._augmentation = augmentation
        self._variants = augmentation.variants
        self._size = size = augmentation.size
        self._device = _device(device)
        self._pinned = self._device.type == "cuda"
        self._at_once = max(1, _PIXELS_AT_ONCE["cuda" if self._pinned else "cpu"] // (size * size))
        # As in torchvision's `_affine_grid`: pixel centres around the middle of the image.
        axis = torch.linspace((1.0 - size) * 0.5, (size - 1.0) * 0.5, steps=size, device=self._device)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        self._centres = torch.stack((x, y, torch.ones_like(x)), dim=-1).view(1, size * size, 3)

    def apply(self, images: Sequence[UInt8Array], draws: Draws) -> UInt8Array:
        """Return variants of the images, (n, 3, size, size), in the order of the draws.

        Args:
            images: m oriented originals, each (height, width, 3 or more), RGB first.
            draws: n = m × variants rows, image by image.
        """
        import torch

        count = len(draws.flip)
        assert count == len(images) * self._variants, "draws and images don't belong together"
        shape = (count, 3, self._size, self._size)
        with torch.inference_mode():
            variants = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
            crops = self._crops(images, draws)
            for start in range(0, count, self._at_once):
                rows = slice(start, min(start + self._at_once, count))
                batch = torch.stack([next(crops) for _ in range(rows.start, rows.stop)])
                batch = self._flip(batch, draws.flip[rows])
                batch = self._rotate(batch, draws.angle[rows])
                batch = self._adjust(batch, draws.jitter[rows], draws.order[rows])
                variants[rows].copy_(batch, non_blocking=True)
            if self._pinned:
                torch.cuda.current_stream(self._device).synchronize()
        return variants.numpy()

    def _crops(self, images: Sequence[UInt8Array], draws: Draws) -> Iterator[Tensor]:
        """Yield each variant's crop, resized: (3, size, size)."""
        from torchvision.transforms.v2 import functional

        for number, image in enumerate(images):
            host = _copied(image, pinned=self._pinned)
            there = host.to(self._device, non_blocking=True)
            for row in range(number * self._variants, (number + 1) * self._variants):
                top, left, height, width = draws.crop[row].tolist()
                tall, wide, first_y, first_x = window(height, width, self._augmentation)
                steep = self._pinned and max(height, width) > _STEEPEST_ON_GPU * self._size
                pixels = (host if steep else there)[:, :, :3].permute(2, 0, 1)
                crop = functional.resized_crop(pixels, top, left, height, width, [tall, wide], antialias=True)
                crop = crop[:, first_y : first_y + self._size, first_x : first_x + self._size]
                yield crop.to(self._device)

    def _flip(self, batch: Tensor, flip: BoolArray) -> Tensor:
        rows = self._rows(flip)
        return batch if rows is None else batch.index_copy_(0, rows, batch[rows].flip(-1))

    def _rotate(self, batch: Tensor, angles: Float32Array) -> Tensor:
        """Rotate around the middle, by the nearest pixel, black beyond the corners, as `functional.rotate` does."""
        import torch
        from torch.nn.functional import grid_sample

        degrees = np.array([angle % 360 for angle in angles.tolist()])
        for quarters in (1, 2, 3):
            rows = self._rows(degrees == 90 * quarters)
            if rows is not None:
                batch.index_copy_(0, rows, torch.rot90(batch[rows], quarters, (-2, -1)))
        others = degrees % 90 != 0
        rows = self._rows(others)
        if rows is None:
            return batch
        matrices = [_inverse_rotation(degree) for degree in degrees[others].tolist()]
        theta = torch.tensor(matrices, dtype=torch.float32).to(self._device).transpose(1, 2)
        theta = theta.div(torch.tensor([0.5 * self._size] * 2, device=self._device))
        # One product each: a product of a whole batch may round differently, and move a pixel.
        grid = torch.cat([torch.bmm(self._centres, one) for one in torch.split(theta, 1)])
        grid = grid.view(-1, self._size, self._size, 2)
        rotated = grid_sample(batch[rows].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
        return batch.index_copy_(0, rows, rotated.to(torch.uint8))

    def _adjust(self, batch: Tensor, jitter: Float32Array, order: UInt8Array) -> Tensor:
        """Apply each variant's colour operations in its order, those of a kind at once."""
        import torch

        operations = ((_brightness, 1), (_contrast, 1), (_saturation, 1), (_hue, 0))
        for step in range(4):
            for number, (operation, neutral) in enumerate(operations):
                chosen = (order[:, step] == number) & (jitter[:, number] != neutral)
                rows = self._rows(chosen)
                if rows is not None:
                    factors = torch.from_numpy(jitter[chosen, number]).to(self._device).view(-1, 1, 1, 1)
                    batch.index_copy_(0, rows, operation(batch[rows], factors))
        return batch

    def _rows(self, chosen: BoolArray) -> Tensor | None:
        import torch

        return torch.from_numpy(np.flatnonzero(chosen)).to(self._device) if chosen.any() else None


class PolicyEngine:
    """Engine that augments images with a user's transform; loaded once per worker.

    Each variant starts from the whole oriented original, with the generators of torch, numpy and Python seeded by its
    key, so that it depends on nothing else. These generators are process-wide: call it from one thread.
    """

    def __init__(self, policy: str, augmentation: Augmentation, device: str = "cpu") -> None:
        """Load torch and the policy.

        Raises:
            ConfigError: the device or the policy doesn't exist.
        """
        import torch

        self._policy = policy
        self._device = _device(device)
        self._pinned = self._device.type == "cuda"
        self._variants = augmentation.variants
        self._size = augmentation.size
        self._transform = load_policy(policy)
        if isinstance(self._transform, torch.nn.Module):
            self._transform.to(self._device)

    def apply(self, images: Sequence[UInt8Array], keys: UInt64Array) -> UInt8Array | Float32Array:
        """Return variants of the images, (m × variants, 3, size, size), image by image; uint8, or float32 of any range.

        Args:
            images: m oriented originals, each (height, width, 3 or more), RGB first.
            keys: (m,) from `draws.image_keys`.

        Raises:
            ConfigError: the policy returned something else.
        """
        from torchvision import tv_tensors

        assert len(keys) == len(images), "keys and images don't belong together"
        seeds = policy_seeds(keys, self._variants)
        out: AnyArray | None = None
        for number, image in enumerate(images):
            pixels = _copied(image, pinned=self._pinned).to(self._device, non_blocking=True)
            original = pixels[:, :, :3].permute(2, 0, 1).contiguous()
            for row in range(number * self._variants, (number + 1) * self._variants):
                # A copy, as a policy may write into its input.
                variant = self._variant(tv_tensors.Image(original.clone()), int(seeds[row]))
                if out is None:
                    out = np.empty((len(seeds), *variant.shape), variant.dtype)
                if out.dtype != variant.dtype:
                    raise ConfigError(
                        f"policy '{self._policy}' gives {out.dtype} for some variants and {variant.dtype} for others; "
                        "end it with v2.ToDtype(torch.uint8, scale=True)"
                    )
                out[row] = variant
        return np.empty((0, 3, self._size, self._size), np.uint8) if out is None else out

    def _variant(self, original: Any, seed: int) -> AnyArray:
        import torch

        with _seeded(seed, self._device), torch.no_grad():
            try:
                made = self._transform(original)
            except Exception as error:
                error.add_note(f"in policy '{self._policy}', given {_described(original)}")
                raise
        shape = (3, self._size, self._size)
        fits = isinstance(made, torch.Tensor) and tuple(made.shape) == shape
        if not fits or not (made.dtype == torch.uint8 or made.is_floating_point()):
            raise ConfigError(
                f"policy '{self._policy}' made {_described(made)} of {_described(original)}; "
                f"it must give a tensor of uint8 or floats, {' × '.join(map(str, shape))}, "
                f"as with v2.RandomResizedCrop({self._size}) in it"
            )
        kept = made if made.dtype == torch.uint8 else made.float()
        found: AnyArray = kept.as_subclass(torch.Tensor).cpu().numpy()
        return found


def load_policy(path: str) -> Callable[..., Any]:
    """Return the transform of an import path, 'package.module:name'.

    It may name the transform, a function of one image, or a class or function without arguments that returns one.

    Args:
        path: As in the configuration; it is imported, which runs its module.

    Raises:
        ConfigError: it can't be imported, doesn't exist, or isn't a transform.
    """
    found: Callable[..., Any] = load_object("policy", path)
    if not callable(found):
        raise ConfigError(
            f"policy = '{path}' is {_described(found)}, no transform; name a torchvision.transforms.v2 transform, "
            "a function of one image, or a class or function without arguments that gives one of these"
        )
    if not (inspect.isclass(found) or inspect.isroutine(found) or isinstance(found, partial)):
        return found
    return _made_by(found, path)


def _made_by(found: Callable[..., Any], path: str) -> Callable[..., Any]:
    """Return the transform that a class or function is, or returns when called without arguments."""
    try:
        signature = inspect.signature(found)
    except ValueError:  # compiled functions may have no signature
        return found
    if not inspect.isclass(found):
        if _accepts(signature, 1) and not _accepts(signature, 0):
            return found
        if any(each.kind is each.VAR_POSITIONAL for each in signature.parameters.values()):
            return found
    if not _accepts(signature, 0):
        cure = "give an instance" if inspect.isclass(found) else "give a function of the image alone"
        raise ConfigError(f"policy = '{path}' needs arguments {signature}; {cure}, by another name in its module")
    try:
        made = found()
    except Exception as error:
        raise ConfigError(
            f"policy = '{path}': calling it failed: {type(error).__name__}: {error}; it must give a transform"
        ) from error
    if not callable(made):
        raise ConfigError(f"policy = '{path}' gave {_described(made)}, no transform; return the transform")
    return made  # type: ignore[no-any-return]


def _accepts(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


@contextmanager
def _seeded(seed: int, device: Any) -> Iterator[None]:
    """Seed the generators of torch, numpy and Python temporarily, then restore them."""
    import torch

    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            random.seed(seed)
            # Python and numpy have the same algorithm: from one seed they would give the same numbers.
            np.random.seed(np.random.SeedSequence(seed).generate_state(8))
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device = '{name}' can't be used here: {str(error).splitlines()[0]}; "
            "take 'cpu', or a machine with that device and a torch built for it"
        ) from error
    return device


def _copied(image: UInt8Array, *, pinned: bool) -> Tensor:
    """Return a tensor of a copy: torch takes no read-only or mirrored arrays, and a GPU copies from pinned memory."""
    import torch

    copy = torch.empty(image.shape, dtype=torch.uint8, pin_memory=pinned)
    copy.numpy()[...] = image
    return copy


def _described(value: object) -> str:
    """Return type and, for tensors and arrays, element type and shape."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    return kind if shape is None or dtype is None else f"{kind} of {dtype}, {' × '.join(map(str, shape)) or 'a scalar'}"


def _inverse_rotation(degrees: float) -> list[list[float]]:
    """Return the map from a result's pixel to its source, around the middle, (2, 3); degrees are counter-clockwise."""
    angle = math.radians(-degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    return [[cosine, sine, 0.0], [-sine, cosine, 0.0]]
