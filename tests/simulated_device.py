"""Parts of the simulated GPU (simulated_gpu.py): its tensors, graphs and events, and what an operator does there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import emulated_cuda
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_map

MEMORY = 1 << 30
"""More than this at once there is not."""
DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
_WAITING = {
    *(_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default),
    *(_aten.unique_dim.default, _aten._unique2.default, _aten.is_nonzero.default),
}
"""What the host has to wait for, besides copies."""
_MIXED = {
    *(_aten.copy_.default, _aten._to_copy.default, _aten.index.Tensor, _aten.index_put_.default),
    *(_aten._index_put_impl_.default, _aten.set_.source_Tensor),
}
"""What takes tensors of the CPU beside those of a GPU."""
_CPU_ARGUMENTS = {"seed", "dropout_seed"}
"""What our own operators read on the CPU."""


class _Tensor(torch.Tensor):
    """A tensor of the GPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> _Tensor:
        shape = {"size": held.size(), "strides": held.stride(), "storage_offset": held.storage_offset()}
        # A view of what was made outside of inference mode is an ordinary tensor, also within it.
        with torch.inference_mode(held.is_inference()):
            # To autograd it is one of the CPU: its engine knows only devices that there are.
            result = torch.Tensor._make_wrapper_subclass(cls, **shape, dtype=held.dtype, device=torch.device("cpu"))
        result.held = held
        return result

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def is_pinned(self, device: object = None) -> bool:
        return False

    def get_device(self) -> int:
        return DEVICE.index

    def cpu(self) -> torch.Tensor:
        return _ToCPU.apply(self)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return moved_to(self, *args, **kwargs)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In files it is what it is read as."""
        return self.held.__reduce_ex__(protocol)

    def __repr__(self, **kwargs: object) -> str:
        return f"{self.held!r} on the simulated GPU"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return current().run(func, args, kwargs or {})


class _Place:
    """Where a tensor lies; does not keep its memory."""

    def __init__(self, x: torch.Tensor) -> None:
        self._storage = StorageWeakRef(x.untyped_storage())
        self._shape = (x.storage_offset(), x.size(), x.stride())
        self._dtype = x.dtype

    def tensor(self) -> torch.Tensor:
        if self._storage.expired():
            raise RuntimeError("a captured graph reads or writes memory that has been given back")
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._shape)


def _poison(storage: torch.UntypedStorage) -> None:
    torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)


class Graph:
    """A CUDA graph: calls of operators with the places of their tensors.

    Attributes:
        values: tensors of the CPU, which the kernels of a GPU take as numbers.
    """

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self._calls: list[tuple[Any, Any, Any, list[_Place | None]]] = []
        self._own: dict[int, torch.UntypedStorage] = {}
        self._captured = False

    def owns(self, x: torch.Tensor) -> bool:
        return x.untyped_storage()._cdata in self._own

    def own(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        self._own[storage._cdata] = storage

    def record(self, run: Any, args: Any, kwargs: Any, results: list[torch.Tensor | None]) -> None:
        """``results``: what comes out in memory of its own."""
        args, kwargs = tree_map(_placed, (args, kwargs))
        self._calls.append((run, args, kwargs, [None if x is None else _Place(x) for x in results]))

    def end(self) -> None:
        for storage in self._own.values():
            _poison(storage)
        self._captured = True

    def replay(self) -> None:
        gpu = current()
        assert self._captured and gpu.capture is None
        for storage in self._own.values():
            _poison(storage)
        with gpu.aside(), torch.inference_mode():
            for run, args, kwargs, places in self._calls:
                args, kwargs = tree_map(_found, (args, kwargs))
                results = tree_flatten(run(*args, **kwargs))[0]
                for place, result in zip(places, results, strict=True):
                    if place is not None:
                        place.tensor().copy_(result)
        gpu.replays += 1


def _placed(x: Any) -> Any:
    return _Place(x) if isinstance(x, torch.Tensor) else x


def _found(x: Any) -> Any:
    return x.tensor() if isinstance(x, _Place) else x


class Event:
    def __init__(self, enable_timing: bool = False, **options: object) -> None:
        self._copies = 0

    def record(self, stream: object = None) -> None:
        self._copies = current().started

    def synchronize(self) -> None:
        current().wait(self._copies)

    def wait(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return current().arrived >= self._copies

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Stream:
    def __init__(self, device: object = None, **options: object) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        current().wait()


class SimulatedGPU:
    """What the host has asked of it.

    Attributes:
        capture: the graph that is being captured.
        replays: of graphs.
        waits: how often the host has waited for the device, but for events.
    """

    def __init__(self) -> None:
        self.capture: Graph | None = None
        self.replays = self.waits = 0
        self.started = self.arrived = 0
        self._copies: list[Callable[[], None]] = []
        self._pinned: dict[int, StorageWeakRef] = {}
        self._composing = False

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within the block operators are the CPU's own."""
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            yield

    @contextlib.contextmanager
    def composing(self, args: Any) -> Iterator[None]:
        """Within the block C++ makes tensors where it takes those of the GPU to be: on the CPU."""
        before = self._composing
        self._composing = before or any(isinstance(x, _Tensor) for x in tree_flatten(args)[0])
        try:
            yield
        finally:
            self._composing = before

    def wait(self, copies: int | None = None) -> None:
        """Until so many copies have arrived, or all."""
        if self.capture is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        with self.aside(), torch.inference_mode():
            while self.arrived < (self.started if copies is None else copies):
                self._copies.pop(0)()
                self.arrived += 1

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What an operator does where one of its tensors is on the GPU, or is to be made there."""
        with self.aside():
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, _Tensor) for x in tensors)
        device = _device(func, args, kwargs)
        if (on_gpu and func._schema.name.startswith("aten::new_")) or (self._composing and not tensors):
            # Autograd and what is composed in C++ ask for the device that they know.
            device = DEVICE
        if not on_gpu and (device is None or device.type != "cuda"):
            return self._on_cpu(func, args, kwargs)
        if func is _aten._to_copy.default:
            # Autograd moves gradients to where it takes the operand to be.
            return self.converted(args[0], on_gpu or (device is not None and device.type == "cuda"), kwargs)
        if func is _aten.copy_.default:
            return self._copied(*args, **kwargs)
        if func is _aten.is_pinned.default:
            return False
        if device is not None and device.type != "cuda":
            return func(*tree_map(_held, args), **tree_map(_held, kwargs))
        _check_devices(func, args, kwargs)
        if func in _WAITING:
            self.waits += 1
            self.wait()
        if self.capture is not None:
            self.capture.values.extend(x for x in tensors if not isinstance(x, _Tensor))
        args_held, kwargs_held = tree_map(_held, (args, kwargs))
        if kwargs_held.get("device") is not None:
            kwargs_held["device"] = torch.device("cpu")
        results = self._called(_kernel(func, args_held), func._schema, args_held, kwargs_held)
        return _wrapped(func._schema, args, kwargs, results)

    def _on_cpu(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func is _aten.is_pinned.default:
            return self._is_pinned(args[0])
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        if self.capture is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **{**kwargs, "pin_memory": False})
        storage = result.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        return result

    def _is_pinned(self, x: torch.Tensor) -> bool:
        found = self._pinned.get(x.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def _called(self, run: Any, schema: Any, args: Any, kwargs: Any) -> Any:
        """Calls an operator on what its tensors hold, or notes it down for a graph."""
        _check_memory(run, args, kwargs)
        graph = self.capture
        if graph is None:
            return run(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)

        def sheltered(x: Any) -> Any:
            return x.clone() if isinstance(x, torch.Tensor) and not graph.owns(x) else x

        # What is not the graph's own must stay as it is until the graph runs.
        safe = tree_map(sheltered, (args, kwargs)) if writes else (args, kwargs)
        results = run(*safe[0], **safe[1])
        fresh: list[torch.Tensor | None] = []
        written = [r.alias_info is not None and r.alias_info.is_write for r in schema.returns]
        flat = tree_flatten(results)[0]
        written += [False] * (len(flat) - len(written))
        for result, is_argument in zip(flat, written, strict=False):
            is_new = isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in given
            fresh.append(result if is_new and not is_argument else None)
            if fresh[-1] is not None:
                graph.own(result)
        if writes or (any(x is not None for x in fresh) and "empty" not in schema.name):
            graph.record(run, args, kwargs, fresh)
        return results

    def converted(self, x: torch.Tensor, to_gpu: bool, kwargs: dict[str, Any]) -> torch.Tensor:
        """``_to_copy``: a copy with another dtype or on another device."""
        kwargs = dict(kwargs)
        late = kwargs.pop("non_blocking", False)
        kwargs.pop("device", None)
        pinned = kwargs.pop("pin_memory", None)
        if isinstance(x, _Tensor) and to_gpu:
            return _Tensor(self._called(_aten._to_copy.default, _aten._to_copy.default._schema, (x.held,), kwargs))
        if to_gpu:
            self._read(x, late)
            return _Tensor(_aten._to_copy.default(x, **kwargs))
        if pinned or (late and self.capture is not None):
            raise NotImplementedError("a copy to new pinned memory")
        self.waits += 1
        self.wait()
        with self.aside():
            return _aten._to_copy.default(x.held, **kwargs)

    def _copied(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """``copy_``."""
        if isinstance(target, _Tensor) and isinstance(source, _Tensor):
            self._called(_aten.copy_.default, _aten.copy_.default._schema, (target.held, source.held), {})
        elif isinstance(target, _Tensor):
            self._read(source, non_blocking)
            target.held.copy_(source)
        elif non_blocking and self._is_pinned(target):
            if self.capture is not None:
                raise NotImplementedError("a captured copy to the host")
            arrived = source.held.clone()
            _poison(target.untyped_storage())
            self._later(lambda: target.copy_(arrived))
        else:
            self.waits += 1
            self.wait()
            target.copy_(source.held)
        return target

    def _read(self, source: torch.Tensor, non_blocking: bool) -> None:
        """A copy of the CPU's memory to the GPU's."""
        if self.capture is not None:
            raise RuntimeError("operation not permitted when stream is capturing: a copy from the host")
        if not (non_blocking and self._is_pinned(source)):
            return
        place, before = _Place(source), source.clone()

        def compare() -> None:
            try:
                now = place.tensor()
            except RuntimeError:
                # PyTorch's allocator keeps what is still being read.
                return
            assert torch.equal(now.view(torch.uint8), before.view(torch.uint8)), "pinned memory changed while read"

        self._later(compare)

    def _later(self, function: Callable[[], None]) -> None:
        self._copies.append(function)
        self.started += 1


def _held(x: Any) -> Any:
    return x.held if isinstance(x, _Tensor) else x


def _device(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.device | None:
    """That which a call names."""
    given = kwargs.get("device")
    for value, argument in zip(args, func._schema.arguments, strict=False):
        if argument.name == "device" and given is None:
            given = value
    return None if given is None else torch.device(given)


def _check_devices(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    if func in _MIXED or func.namespace == "prim":
        return
    named = [*zip((argument.name for argument in func._schema.arguments), args, strict=False), *kwargs.items()]
    ours = func.namespace == "minilm_fast"
    for name, value in named:
        for x in tree_flatten(value)[0]:
            if not isinstance(x, torch.Tensor) or isinstance(x, _Tensor):
                continue
            if name in _CPU_ARGUMENTS if ours else x.dim() == 0:
                continue
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but {name} is on cpu")


def _check_memory(run: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    sizes = args[0] if args and run in (_aten.empty.memory_format, _aten.zeros.default) else ()
    count = 1
    for size in sizes:
        count *= size
    dtype = kwargs.get("dtype") or torch.float32
    if count * dtype.itemsize > MEMORY:
        raise torch.OutOfMemoryError("CUDA out of memory")


def _kernel(func: Any, args: Sequence[Any]) -> Any:
    """What runs an operator on the CPU's tensors as a GPU would."""
    if func.namespace != "minilm_fast":
        return func
    name = func._schema.name.removeprefix("minilm_fast::")
    if name.startswith("triton_"):
        half = any(isinstance(x, torch.Tensor) and x.dtype == torch.float16 for x in args)
        return func if half else getattr(torch.ops.minilm_fast, name.removeprefix("triton_")).default
    if name not in emulated_cuda.OPERATORS:
        raise NotImplementedError(f"{name} has no kernel for CUDA")
    return getattr(emulated_cuda.operators(), name).default


def _wrapped(schema: Any, args: Sequence[Any], kwargs: dict[str, Any], results: Any) -> Any:
    """The results as tensors of the GPU; an argument that was written comes back itself."""
    written = {}
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for alias in argument.alias_info.before_set:
                written[alias] = value

    def one(result: Any, returned: Any) -> Any:
        if returned.alias_info is not None and returned.alias_info.is_write:
            return written[next(iter(returned.alias_info.before_set))]
        return tree_map(lambda x: _Tensor(x) if isinstance(x, torch.Tensor) else x, result)

    if len(schema.returns) == 1:
        return one(results, schema.returns[0])
    if not schema.returns:
        return None
    return tuple(one(*pair) for pair in zip(results, schema.returns, strict=True))


class _ToCPU(torch.autograd.Function):
    """A copy on the CPU; autograd's own does not know that the tensor is elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return current().converted(x, False, {})

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return moved_to(grad, DEVICE)


def moved_to(x: torch.Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
    """``Tensor.to``, which would ask the tensor for its device below Python."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    if args and args[-1] is True and isinstance(args[0], torch.device):
        kwargs["non_blocking"], args = True, args[:-1]
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    wanted = x.device if device is None else torch.device(device)
    if wanted.type == x.device.type:
        return torch.Tensor.to(x, dtype or x.dtype, copy=copy)
    if wanted.type == "cpu":
        return _ToCPU.apply(x).to(dtype or x.dtype)
    return _aten._to_copy.default(x, dtype=dtype, device=DEVICE, non_blocking=non_blocking)


_current: SimulatedGPU | None = None


def current() -> SimulatedGPU:
    assert _current is not None, "the simulated GPU is no longer there"
    return _current


def make_current(gpu: SimulatedGPU | None) -> None:
    """All tensors of the GPU are that one's from now on."""
    global _current
    _current = gpu
