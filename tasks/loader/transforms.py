"""Transforms of samples on their way into a batch, keyed by the sample.

| transform | gets | draws from |
|---|---|---|
| `Augmentation` | a picture | the counter-based draws of the augmentation flow; its compiled kernel makes the pixels |
| one of torchvision, a function of one argument | a tensor | torch, in its own generator |
| a function of two arguments | an array, and a numpy Generator | that one |

The key of a sample's draws is a hash of (seed, epoch, sample id, which of its copies in the epoch it is). So its pixels
are the same for any number of workers, batch size and prefetch, and after resuming, and others in the next epoch.

An `Augmentation` reads stored pictures where their file is mapped. Those that are stored encoded are decoded by the
same threads, each just before it is transformed: by the decoder of the augmentation flow, so that they are the pixels
that the flow stores otherwise.

Transforms run in the thread that makes batches ahead, or in several. The generators of the process belong to the
training: neither its dropout nor a transform may take draws from the other. So torch's random operations are given the
sample's generator while they are dispatched, which concerns one thread only, and torchvision draws as it would after
`torch.manual_seed` of the same seed.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from tasks.io.errors import ConfigError
from tasks.io.tensors import AnyArray, Int64Array, TensorSpec, UInt8Array, UInt64Array
from tasks.loader.arguments import whole_number
from tasks.loader.kernel import separate

if TYPE_CHECKING:
    from tasks.images.config import Augmentation

New = Callable[[TensorSpec], AnyArray]
"""Returns memory for a sample's values of this shape and type, one for each sample."""

_MOST_THREADS = 1024
_TRIED = 8  # samples that are transformed twice, once a stream
_KINDS = (
    "give an Augmentation (tasks.images.config), a transform of torchvision.transforms.v2, a function of one sample, "
    "or a function of a sample and a numpy Generator"
)


Wait = Callable[[], None]
"""Waits until all threads are done, and raises the error of one of them."""


class _Team:
    """Threads that share the samples of a batch: each takes the next one when it is done with one.

    Those that find none go on with the next batch. A single thread is the caller's.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "transform") if count > 1 else None
        self._idle = list(range(count))

    def start(self, work: Callable[[int], None]) -> Wait:
        """Begin to call a function in each thread with a number, which no other thread has at that time."""
        if self._pool is None:
            work(0)
            return nothing

        def numbered() -> None:
            number = self._idle.pop()
            try:
                work(number)
            finally:
                self._idle.append(number)

        running = [self._pool.submit(numbered) for _ in range(self.count)]

        def wait_for_all() -> None:
            wait(running)
            for one in running:
                one.result()

        return wait_for_all

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def nothing() -> None:
    """Wait for nothing."""


class Undecodable(Exception):
    """Some encoded pictures can't be decoded.

    Attributes:
        faults: why not, by the number of the sample.
    """

    def __init__(self, faults: Mapping[int, str]) -> None:
        super().__init__(f"{len(faults)} pictures can't be decoded")
        self.faults = faults


class Decoding:
    """Decoder of encoded pictures in threads.

    Args:
        spec: Shape and element type of a decoded picture: (3, height, width), uint8.
        team: The threads.

    """

    def __init__(self, spec: TensorSpec, team: _Team) -> None:
        from tasks.images.decode import Decoded, Decoder

        self.spec, self.team, self._kind = spec, team, Decoded
        _, self._height, self._width = spec.shape
        self._decoders = [Decoder(self._height * self._width, (255, 255, 255)) for _ in range(team.count)]

    def pixels(self, worker: int, data: UInt8Array) -> UInt8Array | str:
        """Decode a picture in a thread: (height, width, 4), red, green, blue and any; or why not.

        They are valid until the thread's next call.
        """
        found = self._decoders[worker].decode(data.data)
        wanted = f"a picture of {self._width} × {self._height} pixels"
        if isinstance(found, self._kind):
            height, width, _ = found.pixels.shape
            if (height, width) == (self._height, self._width):
                return found.pixels
            return f"it has {width} × {height} pixels, and the manifest says {wanted}"
        if found.reason == "too_many_pixels":
            return f"it has more pixels than {wanted}, as the manifest says"
        return f"{found.reason}: {found.detail}"


class Encoded:
    """Encoded pictures of some samples, which are decoded when they are used.

    Args:
        data: Their bytes, one after the other.
        starts: (n + 1,) where each starts.
        decoding: The decoder.

    """

    def __init__(self, data: UInt8Array, starts: Int64Array, decoding: Decoding) -> None:
        self._data, self._starts, self._decoding = data, starts, decoding

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return int(self._data.nbytes)

    def each(self, work: Callable[[int, int, UInt8Array], None]) -> Wait:
        """Begin to call a function with each decoded picture: the thread's number, the sample's, and its pixels.

        The returned function raises `Undecodable` if some can't be decoded; the function was called with the others.
        """
        faults: dict[int, str] = {}
        rows = iter(range(len(self)))  # of which each number comes once, whoever asks for it

        def share(worker: int) -> None:
            for row in rows:
                pixels = self._decoding.pixels(worker, self._data[self._starts[row] : self._starts[row + 1]])
                if isinstance(pixels, str):
                    faults[row] = pixels
                else:
                    work(worker, row, pixels)

        wait_for_all = self._decoding.team.start(share)

        def end() -> None:
            wait_for_all()
            if faults:
                raise Undecodable(faults)

        return end

    def planes(self, out: AnyArray) -> Wait:
        """Begin to write the decoded pictures, (n, 3, height, width); `each` says what is returned."""
        return self.each(lambda _, row, pixels: separate(pixels.reshape(-1).view(np.uint32), out[row].reshape(3, -1)))


class Mapped:
    """Pictures of some samples in mapped files, which are read when they are used.

    Args:
        addresses: (n,) address of each.
        spec: Their shape and element type.
        holder: What keeps the addresses valid.

    """

    def __init__(self, addresses: Int64Array, spec: TensorSpec, holder: Any) -> None:
        self.addresses, self._spec, self._holder = addresses, spec, holder

    def __len__(self) -> int:
        return len(self.addresses)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return len(self) * self._spec.width


class Change(Protocol):
    """Change of the inputs of some samples.

    Attributes:
        team: threads that change them.
        takes_stored: True if it takes pictures where they are, `Encoded` or `Mapped`, and any number of samples; else
            at least one.
    """

    team: _Team
    takes_stored: bool

    def start(self, values: Any, keys: UInt64Array, ids: Int64Array, new: New) -> tuple[AnyArray, Wait]:
        """Return memory of the changed inputs of n samples, and a function that waits until they are there.

        Args:
            values: (n, *shape) inputs as stored, which may be written to; or stored ones.
            keys: (n,) keys of their draws.
            ids: (n,) ids, for messages.
            new: Memory for the result.

        Raises:
            ConfigError: a transform gave something that can't be delivered; here or in the returned function.
            Undecodable: some pictures can't be decoded; likewise.
        """
        ...


class _Augmented:
    """Pictures augmented by the compiled kernel of the augmentation flow."""

    takes_stored = True

    def __init__(self, augmentation: Augmentation, spec: TensorSpec, team: _Team) -> None:
        from tasks.images.kernel import FusedEngine

        self.team, self._augmentation = team, augmentation
        self._made = TensorSpec((3, augmentation.size, augmentation.size), "uint8")
        self._spec, (_, self._height, self._width) = spec, spec.shape
        self._engines = [FusedEngine(augmentation) for _ in range(team.count)]
        self._figures = [np.empty((1, 2), np.float32) for _ in range(team.count)]

    def start(self, values: Any, keys: UInt64Array, ids: Int64Array, new: New) -> tuple[AnyArray, Wait]:  # noqa: ARG002
        from tasks.images.draws import draw

        heights, widths = np.full((2, len(keys)), [[self._height], [self._width]], np.int64)
        draws = draw(keys, heights, widths, self._augmentation)
        out = new(self._made)

        def augment(worker: int, row: int, pixels: UInt8Array) -> None:
            self._engines[worker].augment(pixels, draws, row, out[row : row + 1], self._figures[worker])

        if isinstance(values, Encoded):
            return out, values.each(augment)
        if isinstance(values, np.ndarray):
            addresses = values.ctypes.data + values.strides[0] * np.arange(len(values))
            values = Mapped(addresses, self._spec, values)
        parameters, taken = self._engines[0].parameters(draws, 0, len(keys)), np.zeros(1, np.int64)

        def share(worker: int) -> None:
            sides = self._height, self._width
            self._engines[worker].augment_stored(values.addresses, sides, taken, parameters, out)

        return out, self.team.start(share)


class _Called:
    """Samples transformed by a caller's function, or by torchvision; decoded before.

    Args:
        function: Of a tensor; or of an array and a numpy Generator.
        team: Threads.
        numpy: True for a function of an array and a Generator.

    """

    takes_stored = False

    def __init__(self, function: Callable[..., Any], team: _Team, *, numpy: bool) -> None:
        self.team, self._function = team, function
        self._calls = [_with_generator(function) if numpy else _with_torch(function) for _ in range(team.count)]
        self._first: tuple[TensorSpec, int] | None = None

    def start(self, values: Any, keys: UInt64Array, ids: Int64Array, new: New) -> tuple[AnyArray, Wait]:
        from tasks.images.draws import policy_seeds

        seeds = policy_seeds(keys, 1).tolist()
        if self._first is None:
            first = self._tried(values, seeds, ids)
            self._first = TensorSpec(first.shape, first.dtype.name), int(ids[0])
        spec, number = self._first
        out, rows = new(spec), iter(range(len(values)))

        def work(worker: int) -> None:
            for row in rows:
                made = self._call(worker, values[row], seeds[row], int(ids[row]))
                found = TensorSpec(made.shape, made.dtype.name)
                if found != spec:
                    raise ConfigError(
                        f"the transform gives {described(found)} for sample {ids[row]}, and {described(spec)} for "
                        f"sample {number}: all must have one shape and type; end it with a resize or a conversion"
                    )
                out[row] = made

        return out, self.team.start(work)

    def _tried(self, values: AnyArray, seeds: list[int], ids: Int64Array) -> AnyArray:
        """Return the first sample transformed; refuse a function that draws from elsewhere, as some samples show."""
        tried = []
        for row in range(min(_TRIED, len(values))):
            one, other = (self._call(0, values[row].copy(), seeds[row], int(ids[row])) for _ in range(2))
            if one.shape == other.shape and not np.array_equal(one, other, equal_nan=one.dtype != np.uint8):
                raise ConfigError(
                    f"the transform gives two different results for sample {ids[row]} and the same draws, so it draws "
                    "from Python's or numpy's own generator, or remembers: draw from torch, or from the numpy "
                    "Generator that is the second argument of a function of two"
                )
            tried.append(one)
        return tried[0]

    def _call(self, worker: int, values: AnyArray, seed: int, sample: int) -> AnyArray:
        try:
            made = self._calls[worker](values, seed)
        except Exception as error:
            error.add_note(f"in the transform {self._function!r}, of sample {sample}")
            raise
        return self._made(made, sample)

    def _made(self, made: Any, sample: int) -> AnyArray:
        """Return a transformed sample as uint8 or float32."""
        if type(made).__module__.partition(".")[0] in ("torch", "torchvision") and hasattr(made, "detach"):
            floats, plain = made.is_floating_point(), made.detach().cpu()
            made = (plain.float() if floats else plain).numpy()
        if not isinstance(made, np.ndarray) or not (made.dtype == np.uint8 or made.dtype.kind == "f"):
            kind = f"{made.dtype}" if isinstance(made, np.ndarray) else type(made).__name__
            raise ConfigError(
                f"the transform gives {kind} for sample {sample}: return a tensor or an array of uint8 or floats"
            )
        return made if made.dtype == np.uint8 else made.astype(np.float32, copy=False)


def _with_generator(function: Callable[..., Any]) -> Callable[[AnyArray, int], Any]:
    return lambda values, seed: function(values, np.random.Generator(np.random.Philox(key=seed)))


def _with_torch(function: Callable[..., Any]) -> Callable[[AnyArray, int], Any]:
    """Return the function of an array that gives torch's random operations a generator of the seed."""
    import torch

    drawing = _torch_draws()

    def call(values: AnyArray, seed: int) -> Any:
        with drawing(seed), torch.no_grad():
            return function(torch.from_numpy(values))

    return call


def _torch_draws() -> Callable[[int], Any]:
    """Return a context in which random operations of torch in this thread draw from a generator of a seed."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    generator = torch.Generator()
    known: dict[Any, Callable[..., Any]] = {}

    class Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            call = known.get(func)
            if call is None:
                call = known[func] = _drawing_from(generator, func)
            return call(*args, **(kwargs or {}))

    mode: Any = Drawing()  # type: ignore[no-untyped-call]

    @contextmanager
    def drawing(seed: int) -> Iterator[None]:
        generator.manual_seed(seed)
        with mode:
            yield

    return drawing


def _drawing_from(generator: Any, operation: Any) -> Callable[..., Any]:
    """Return an operation of torch that draws from a generator, unless it is given another or doesn't draw."""
    import torch

    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return operation  # type: ignore[no-any-return]
    packet, overload = operation.overloadpacket, operation._overloadname
    if any(argument.name == "generator" for argument in operation._schema.arguments):
        return lambda *args, **kwargs: operation(*args, **{**kwargs, "generator": kwargs.get("generator") or generator})
    other = getattr(packet, "generator" if overload == "default" else f"{overload}_generator", None)
    if other is None:
        raise ConfigError(
            f"the transform draws by torch's {packet.__name__}, which takes no generator: draw by another one, or give "
            "a function of a sample and a numpy Generator"
        )
    return functools.partial(other, generator=generator)


def decoding_of(spec: TensorSpec, threads: Any) -> Decoding:
    """Return a decoder of pictures in threads of its own."""
    return Decoding(spec, _Team(_threads(threads, _cpus())))


def change_of(transform: Any, spec: TensorSpec, threads: Any, *, pictures: bool) -> tuple[Change, dict[str, str]]:
    """Return the change that a transform is, and what a state says of it."""
    from tasks.images.config import Augmentation

    if isinstance(transform, Augmentation):
        if not pictures:
            raise ConfigError("transform is an Augmentation, which is for pictures, and these samples are rows")
        if spec.shape[0] != 3:
            raise ConfigError(
                f"transform is an Augmentation, which takes 3 channels, and pictures are {described(spec)}"
            )
        one = transform.model_copy(update={"variants": 1})
        # The other settings don't affect pixels.
        kept = {"kind": type(one).__name__, **one.model_dump(mode="json", exclude={"variants", "mean", "std"})}
        told = {"augmentation": xxhash.xxh3_128_hexdigest(json.dumps(kept, sort_keys=True).encode())}
        if one.policy is None:
            return _Augmented(one, spec, _Team(_threads(threads, _cpus()))), told
        from tasks.images.transforms import load_policy

        return _Called(load_policy(one.policy), _Team(_threads(threads, 1)), numpy=False), told
    if not callable(transform) or inspect.isclass(transform):
        hint = " (a class: give an instance)" if inspect.isclass(transform) else ""
        raise ConfigError(f"transform = {transform!r}{hint}: {_KINDS}")
    return _Called(transform, _Team(_threads(threads, 1)), numpy=_takes_generator(transform)), {}


def _takes_generator(function: Callable[..., Any]) -> bool:
    """Return True for a function of two arguments, False for one of one."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # compiled functions may have no signature
        return False
    for count in (1, 2):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return count == 2
    raise ConfigError(f"transform takes the arguments {signature}: {_KINDS}")


def _threads(threads: Any, default: int) -> int:
    if threads is None:
        return default
    cure = f"give the number of threads that transform, 1 to {_MOST_THREADS - 1}"
    return whole_number("transform_threads", threads, cure, least=1, below=_MOST_THREADS)


def _cpus() -> int:
    """Return the CPUs of this process, shared among the workers of this node that a launcher tells of."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(there // max(int(local) if local.isdecimal() else 1, 1), 1)


def described(spec: TensorSpec) -> str:
    """Return type and shape in words."""
    return f"{spec.dtype} of {' × '.join(map(str, spec.shape)) or 'no axis'}"
