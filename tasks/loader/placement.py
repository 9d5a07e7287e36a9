"""From gathered values to the batch of a training loop: normalised, of the requested type, on its device.

| for | gathered into | normalised | handed out as |
|---|---|---|---|
| numpy | memory that is used again | on the CPU, compiled | arrays |
| the CPU | memory that is used again | on the CPU, compiled | tensors over the same memory |
| a GPU | pinned memory | on the GPU, after the copy: images travel as bytes | tensors, in a stream of their own |

Memory is lent: it returns, to be used again, when the array handed out over it is finalised, which every
view, slice and tensor of it keeps alive. So a batch belongs to its holder. Reuse matters: the first touch of fresh
memory takes longer than filling it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tasks.io.errors import ConfigError
from tasks.io.tensors import AnyArray, TensorSpec
from tasks.loader.kernel import normalise_pixels, normalise_planes, normalise_rows

if TYPE_CHECKING:
    import torch


INPUTS = ("features", "image")
DTYPES = ("float32", "float16", "bfloat16", "float64")


class Constants:
    """Treatment of a version's inputs, beside moving them.

    Args:
        definition: `manifest.definition` of the version.
        normalise: True to normalise.
        dtype: Element type of the inputs, by its name or torch's or numpy's; None: float32 if normalised, else as
            stored.
        channels_last: True to store the channels of a pixel side by side in memory; the shape stays.

    Raises:
        ConfigError: the type isn't one of `DTYPES`.

    """

    def __init__(self, definition: Mapping[str, Any], normalise: bool, dtype: Any, channels_last: bool) -> None:
        constants = definition["normalise"]
        normalise = normalise and definition["kind"] != "sequences"
        self.normalise, self.channels_last = normalise, channels_last and definition["kind"] == "images"
        self.mean, self.std = (np.array(constants[name], np.float32) for name in ("mean", "std"))
        self.scale = float(constants.get("scale", 1))
        mean, std = (np.array(constants[name], np.float64) for name in ("mean", "std"))
        self.factor, self.shift = (1 / (self.scale * std)).astype(np.float32), (-mean / std).astype(np.float32)
        self._stored = "uint8" if definition["kind"] == "images" else "float32"
        self.dtype = None if dtype is None else _dtype_name(dtype)
        if normalise and self.dtype is None:
            self.dtype = "float32"

    def apply_to(self, dtype: str) -> bool:
        """Return True if inputs of this type are to be normalised: pictures that a transform made floats of aren't."""
        return self.normalise and dtype == self._stored


class _Memory(np.ndarray[Any, np.dtype[Any]]):
    """Memory that is lent as plain arrays.

    Its type matters: views of a plain array refer to that array's base, unless it is of another type (as
    with numpy's memmap). So they refer to the array that was lent.
    """


class _Loan:
    """Memory and the lent array over it; entered in a list of free ones again when the array is finalised."""

    __slots__ = ("_free", "_memory", "_out")

    def __init__(self, memory: _Memory, free: list[_Loan]) -> None:
        self._memory, self._free = memory, free
        self._out: weakref.ref[AnyArray] | None = None

    def lend(self) -> AnyArray:
        """Return an array over the memory, which must be free."""
        array = self._memory.view(np.ndarray)
        self._out = weakref.ref(array, self._back)
        return array

    def _back(self, _: weakref.ref[AnyArray]) -> None:
        # In the thread that has dropped it: appending to a list is one step.
        self._free.append(self)


class Buffers:
    """Memory that is reused when no array or tensor over it is held.

    One thread at a time may take; others may drop their arrays.

    Args:
        limit: Arrays of each shape to keep; further ones are fresh.

    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: dict[tuple[tuple[int, ...], str], tuple[list[_Loan], list[_Loan]]] = {}

    def take(self, shape: tuple[int, ...], dtype: str) -> AnyArray:
        """Return an uninitialised array."""
        pool = self._kept.get((shape, dtype))
        if pool is None:
            pool = self._kept[shape, dtype] = ([], [])
        kept, free = pool
        if free:
            return free.pop().lend()
        if len(kept) < self._limit:
            kept.append(_Loan(_Memory(shape, dtype), free))
            return kept[-1].lend()
        return np.empty(shape, dtype)


class Placement(Protocol):
    """Maker of batches; `buffer` and `place` are called by the gathering thread, `receive` by the consumer's."""

    on_gpu: bool

    def buffer(self, spec: TensorSpec, count: int) -> AnyArray:
        """Return the array to gather a column's values in, (count, *shape)."""
        ...

    def place(self, gathered: dict[str, AnyArray]) -> Any:
        """Turn gathered values into a batch, or begin to."""
        ...

    def receive(self, placed: Any) -> dict[str, Any]:
        """Return the batch, ready for use."""
        ...


def placement(constants: Constants, device: Any, as_numpy: bool, buffers: int) -> Placement:
    """Return the placement for a device.

    Args:
        constants: Treatment of inputs.
        device: Torch's device or its name; None: the current GPU if there is one, else the CPU.
        as_numpy: Arrays instead of tensors; PyTorch isn't needed then.
        buffers: Batches that may be in use at the same time without new memory.

    Raises:
        ConfigError: there is no such device, or numpy doesn't know the type.
    """
    if as_numpy:
        if constants.dtype == "bfloat16":
            raise ConfigError("dtype = 'bfloat16' with as_numpy: numpy has no such type; use 'float32' or 'float16'")
        if device is not None and str(device) != "cpu":
            raise ConfigError(f"device = '{device}' with as_numpy: arrays are on the CPU; leave one of them out")
        return _OnHost(constants, buffers)
    import torch

    where = _device(device)
    if where.type == "cpu":
        return _OnCpu(constants, buffers)
    if where.type == "cuda":
        return _OnCuda(constants, where)
    try:
        torch.empty(0, device=where)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ConfigError(f"device = '{where}' isn't there ({error}); use 'cpu'") from error
    return _Elsewhere(constants, buffers, where)


class _OnHost:
    """Arrays on the CPU."""

    on_gpu = False

    def __init__(self, constants: Constants, buffers: int) -> None:
        self._constants = constants
        self._buffers = Buffers(buffers)
        # Inputs to convert are gathered into memory that isn't handed out; those of the next batch, too, meanwhile.
        self._passing = Buffers(2)

    def buffer(self, spec: TensorSpec, count: int) -> AnyArray:
        passing = spec.dtype == "uint8" and self._constants.normalise
        return (self._passing if passing else self._buffers).take((count, *spec.shape), spec.dtype)

    def place(self, gathered: dict[str, AnyArray]) -> Any:
        for name in INPUTS:
            if name in gathered:
                gathered[name] = self._typed(self._input(gathered[name]))
        return gathered

    def receive(self, placed: Any) -> dict[str, Any]:
        batch: dict[str, Any] = placed
        return batch

    def _input(self, values: AnyArray) -> AnyArray:
        constants = self._constants
        normalise = constants.apply_to(values.dtype.name)
        if values.ndim != 4:
            if normalise:
                normalise_rows(values, constants.mean, constants.std, values)
            return values
        count, channels, height, width = values.shape
        turned = (count, height, width, channels)
        if not normalise:
            if not constants.channels_last:
                return values
            out = self._buffers.take(turned, values.dtype.name)
            out[...] = values.transpose(0, 2, 3, 1)
            return out.transpose(0, 3, 1, 2)
        planes = values.reshape(count, channels, height * width)
        out = self._buffers.take(turned if constants.channels_last else values.shape, "float32")
        if constants.channels_last:
            flat = out.reshape(count, height * width, channels)
            normalise_pixels(planes, constants.factor, constants.shift, flat)
            return out.transpose(0, 3, 1, 2)
        normalise_planes(planes, constants.factor, constants.shift, out.reshape(planes.shape))
        return out

    def _typed(self, values: AnyArray) -> Any:
        dtype = self._constants.dtype
        return values if dtype is None else values.astype(dtype, copy=False)


class _OnCpu(_OnHost):
    """Tensors on the CPU, over the same memory."""

    def place(self, gathered: dict[str, AnyArray]) -> Any:
        import torch

        placed = super().place(gathered)
        return {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in placed.items()}

    def _typed(self, values: AnyArray) -> Any:
        import torch

        dtype = self._constants.dtype
        return values if dtype in (None, values.dtype.name) else torch.from_numpy(values).to(getattr(torch, str(dtype)))


class _Elsewhere(_OnCpu):
    """Tensors on another kind of device: made on the CPU and moved."""

    def __init__(self, constants: Constants, buffers: int, device: torch.device) -> None:
        super().__init__(constants, buffers)
        self._device = device

    def receive(self, placed: Any) -> dict[str, Any]:
        return {name: values.to(self._device) for name, values in placed.items()}


class _OnCuda:
    """Tensors on a GPU. Copies and arithmetic are queued in a separate stream, beside the training's."""

    on_gpu = True

    def __init__(self, constants: Constants, device: torch.device) -> None:
        import torch

        self._constants, self._device = constants, device
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device)
        shape = (1, -1, 1, 1) if constants.scale != 1 else (1, -1)
        with torch.cuda.stream(self._stream):
            self._mean, self._std = (
                torch.from_numpy(values).to(device).reshape(shape) for values in (constants.mean, constants.std)
            )
        self._stream.synchronize()
        self._copied_from: deque[tuple[Any, dict[str, AnyArray]]] = deque()

    def buffer(self, spec: TensorSpec, count: int) -> AnyArray:
        import torch

        # PyTorch reuses pinned memory.
        pinned = torch.empty((count, *spec.shape), dtype=getattr(torch, spec.dtype), pin_memory=True)
        values: AnyArray = pinned.numpy()
        return values

    def place(self, gathered: dict[str, AnyArray]) -> Any:
        import torch

        cuda: Any = torch.cuda
        with cuda.device(self._device), cuda.stream(self._stream):
            moved = {
                name: torch.from_numpy(values).to(self._device, non_blocking=True) for name, values in gathered.items()
            }
            for name in INPUTS:
                if name in moved:
                    moved[name] = self._input(moved[name])
            done = cuda.Event()
            done.record(self._stream)
        # Pinned memory must stay until the copies from it are done.
        self._copied_from.append((done, gathered))
        while self._copied_from[0][0].query() and len(self._copied_from) > 1:
            self._copied_from.popleft()
        return moved, done

    def receive(self, placed: Any) -> dict[str, Any]:
        import torch

        moved, done = placed
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        for values in moved.values():
            values.record_stream(current)  # else its memory might be reused while the training uses it
        batch: dict[str, Any] = moved
        return batch

    def _input(self, values: torch.Tensor) -> torch.Tensor:
        import torch

        constants = self._constants
        if constants.channels_last and values.ndim == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        if constants.apply_to(str(values.dtype).removeprefix("torch.")):
            values = values.to(torch.float32)
            if constants.scale != 1:
                values = values.div_(constants.scale)
            values = values.sub_(self._mean).div_(self._std)
        return values if constants.dtype is None else values.to(getattr(torch, constants.dtype))


def _device(device: Any) -> torch.device:
    """Return the torch device; check that a GPU exists."""
    import torch

    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"device = {device!r} is no device: use 'cpu', 'cuda' or 'cuda:0'") from error
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise ConfigError(f"device = '{found}', but PyTorch finds no GPU here; use 'cpu', or leave device out")
        number = torch.cuda.current_device() if found.index is None else found.index
        if number >= count:
            raise ConfigError(f"device = '{found}', but there are {count} GPUs, from 'cuda:0' on")
        return torch.device("cuda", number)
    return found


def _dtype_name(dtype: Any) -> str:
    # torch.float32 is the text of one, np.float32 a class.
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        try:
            name = np.dtype(dtype).name
        except (TypeError, ValueError, SyntaxError):  # of values, dicts and texts that describe none
            name = str(dtype)
    if name not in DTYPES:
        raise ConfigError(f"dtype = {name} isn't for inputs: use one of {', '.join(DTYPES)}")
    return name
