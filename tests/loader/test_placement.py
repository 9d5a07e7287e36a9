from __future__ import annotations

import ctypes
import gc
import sys

import numpy as np
import pytest
import torch

from tasks.io.errors import ConfigError
from tasks.io.tensors import TensorSpec
from tasks.loader.placement import Buffers, Constants, placement

TABLE = {"kind": "table", "normalise": {"mean": [1.0, -2.0, 0.5], "std": [2.0, 3.0, 1.0]}}
IMAGES = {"kind": "images", "normalise": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "scale": 255}}
ROWS = np.random.default_rng(0).normal(0, 5, (7, 3)).astype(np.float32)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3, 5, 4), np.uint8)


def placed(definition, values, *, device="cpu", as_numpy=False, **options):
    options = {"normalise": True, "dtype": None, "channels_last": False, **options}
    place = placement(Constants(definition, **options), device, as_numpy, 3)
    name = "features" if definition is TABLE else "image"
    buffer = place.buffer(TensorSpec(values.shape[1:], values.dtype.name), len(values))
    buffer[...] = values
    label = place.buffer(TensorSpec((), "int64"), len(values))
    label[...] = range(len(values))
    batch = place.receive(place.place({name: buffer, "label": label}))
    assert device == "meta" or batch["label"].tolist() == list(range(len(values)))
    return batch[name]


@pytest.mark.parametrize("as_numpy", [False, True])
def test_rows_are_normalised_by_the_plain_formula(as_numpy: bool) -> None:
    found = placed(TABLE, ROWS, as_numpy=as_numpy)
    assert isinstance(found, np.ndarray if as_numpy else torch.Tensor)
    expected = (ROWS - np.float32([1, -2, 0.5])) / np.float32([2, 3, 1])
    assert np.array_equal(np.asarray(found), expected)
    assert np.array_equal(np.asarray(placed(TABLE, ROWS, as_numpy=as_numpy, normalise=False)), ROWS)


@pytest.mark.parametrize("as_numpy", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(6, 3, 5, 4), (1, 3, 1, 9)])
def test_images_are_normalised_by_the_plain_formula(as_numpy: bool, channels_last: bool, shape) -> None:
    pixels = np.resize(PIXELS, shape)
    mean, std = (np.array(IMAGES["normalise"][name])[:, None, None] for name in ("mean", "std"))
    found = placed(IMAGES, pixels, as_numpy=as_numpy, channels_last=channels_last)
    assert str(found.dtype).endswith("float32")
    np.testing.assert_allclose(np.asarray(found), (pixels / 255 - mean) / std, rtol=1e-5, atol=2e-6)
    stored = placed(IMAGES, pixels, as_numpy=as_numpy, channels_last=channels_last, normalise=False)
    assert np.array_equal(np.asarray(stored), pixels)
    assert stored.dtype in (torch.uint8, np.dtype(np.uint8))
    for values in (found, stored):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        tensor = torch.from_numpy(values) if as_numpy else values
        assert tensor.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "float64", np.float16, np.dtype("float32")])
@pytest.mark.parametrize(("definition", "values"), [(TABLE, ROWS), (IMAGES, PIXELS)], ids=["table", "images"])
@pytest.mark.parametrize("normalise", [False, True])
def test_inputs_have_the_type_that_is_asked_for(dtype, definition, values, normalise: bool) -> None:
    found = placed(definition, values, dtype=dtype, normalise=normalise)
    expected = placed(definition, values, normalise=normalise)
    assert str(found.dtype) == (str(dtype) if isinstance(dtype, torch.dtype) else f"torch.{np.dtype(dtype).name}")
    assert torch.equal(found, expected.to(found.dtype))


def test_numpy_has_types_too() -> None:
    found = placed(IMAGES, PIXELS, dtype="float16", as_numpy=True)
    assert found.dtype == np.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype = int8 isn't for inputs: use one of float32"),
        ({"dtype": "bfloat16", "as_numpy": True}, "numpy has no such type"),
        ({"device": "cuda", "as_numpy": True}, "arrays are on the CPU"),
        ({"device": "nothing"}, "device = 'nothing' is no device"),
    ],
)
def test_what_cannot_be_is_refused(options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        placed(TABLE, ROWS, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named_and_none_is_taken_by_itself() -> None:
    with pytest.raises(ConfigError, match="device = 'cuda:1', but PyTorch finds no GPU here; use 'cpu'"):
        placed(TABLE, ROWS, device="cuda:1")
    assert placed(TABLE, ROWS, device=None).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("definition", "values"), [(TABLE, ROWS), (IMAGES, PIXELS)], ids=["table", "images"])
def test_a_gpu_gives_what_the_cpu_gives(definition, values) -> None:
    found = placed(definition, values, device=None, channels_last=True)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), placed(definition, values, channels_last=True))


def test_other_devices_get_what_the_cpu_gives() -> None:
    found = placed(TABLE, ROWS, device="meta")
    assert (found.device.type, found.shape, found.dtype) == ("meta", (7, 3), torch.float32)


def test_memory_is_used_again_only_when_nobody_holds_it() -> None:
    buffers = Buffers(limit=2)
    first = buffers.take((4, 5), "float32")
    address = first.ctypes.data
    row = torch.from_numpy(first)[1].numpy()[2:]  # a view of a view of a view
    row[...] = 7
    second = buffers.take((4, 5), "float32")
    third = buffers.take((4, 5), "float32")  # beyond the limit
    assert len({address, second.ctypes.data, third.ctypes.data}) == 3
    del first
    assert buffers.take((4, 5), "float32").ctypes.data != address
    assert row.tolist() == [7, 7, 7]
    del row
    assert buffers.take((4, 5), "float32").ctypes.data == address
    assert buffers.take((5, 4), "float32").ctypes.data != address


HOLDERS = {
    "the array": lambda array: array,
    "a view": lambda array: array.view(),
    "a view of a view of a slice": lambda array: array[1:].view().reshape(-1)[3:].view(np.uint32),
    "a transposed array": lambda array: array.T,
    "a subclass": lambda array: array.view(np.matrix),
    "strides": lambda array: np.lib.stride_tricks.as_strided(array, (2, 2), (4, 4)),
    "a buffer": memoryview,
    "an array over a buffer": lambda array: np.frombuffer(array, np.uint8),
    "an iterator": lambda array: array.flat,
    "a tensor": torch.from_numpy,
    "a slice of a tensor": lambda array: torch.from_numpy(array)[1:, 2],
    "a tensor's array": lambda array: torch.from_numpy(array).numpy()[2],
    "a tensor's storage": lambda array: torch.from_numpy(array).untyped_storage(),
    "a tensor by dlpack": torch.from_dlpack,
    "a parameter": lambda array: torch.nn.Parameter(torch.from_numpy(array)).detach(),
    "a graph": lambda array: (torch.from_numpy(array).requires_grad_() ** 2).sum(),
    "a cycle": lambda array: (held := [array], held.append(held))[0],
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_whatever_refers_to_memory_keeps_it_however_references_are_counted(hold, monkeypatch) -> None:
    """CPython 3.14 borrows references: a count that is read tells less than there are."""
    real = sys.getrefcount
    monkeypatch.setattr(sys, "getrefcount", lambda thing: real(thing) - 2)
    buffers = Buffers(limit=1)
    array = buffers.take((4, 5), "float32")
    address = array.ctypes.data
    array[...] = 7
    held = hold(array)
    del array
    for _ in range(3):
        fresh = buffers.take((4, 5), "float32")
        assert fresh.ctypes.data != address
        fresh[...] = -1
        del fresh
    whole = np.ctypeslib.as_array((ctypes.c_float * 20).from_address(address))
    assert whole.tolist() == [7] * 20
    del held
    gc.collect()
    assert buffers.take((4, 5), "float32").ctypes.data == address


def test_memory_outlives_its_pool() -> None:
    buffers = Buffers(limit=1)
    row = torch.from_numpy(buffers.take((1000, 1000), "float32"))[5]
    row[...] = 3
    del buffers
    gc.collect()
    others = [np.full((1000, 1000), -1, np.float32) for _ in range(4)]
    assert row.unique().tolist() == [3]
    assert len(others) == 4
