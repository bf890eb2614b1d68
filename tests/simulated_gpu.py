"""A GPU that is not there: what is around the kernels runs as on a GPU, on the CPU.

Within :func:`simulated_gpu` tensors on ``"cuda"`` can be had. They say that they are there, and refuse what those of a
GPU refuse: to meet tensors of the CPU, to go where a kernel is missing. What they hold is on the CPU. The operators of
csrc/cuda are the emulated ones; in place of those of Triton, which it takes long to interpret and which have tests of
their own, the C++ ones of the same name run, but for fp16; PyTorch's are its own for the CPU.

Three things that a GPU does behind the host's back are modelled, so that what relies on them wrongly fails:

* A capture records and changes nothing; whatever waits for the device in it is an error. A replay works with the
  addresses of the capture: memory that has been given back since is an error, and what the graph has for itself holds
  NaN when it starts.
* A copy into pinned memory arrives when an event after it, or the device, has been waited for. Before, it holds NaN.
* A copy from pinned memory may read as late as that: what has been changed by then is an error.

Streams are not modelled: everything happens in the order in which it is asked for.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import emulated_cuda
import pytest
import torch
from simulated_device import DEVICE, MEMORY, Event, Graph, SimulatedGPU, Stream, current, make_current, moved_to
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from minilm_fast.ops import _cuda


class _Dispatch(TorchDispatchMode):
    """Sees what makes tensors, for which there is none yet to ask."""

    def __init__(self, gpu: SimulatedGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # In inference mode what is put together from other operators comes here, too.
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self, self._gpu.composing(args):
                return func.decompose(*args, **kwargs)
        explicit = torch._C.DispatchKey.CompositeExplicitAutograd
        if func.namespace == "minilm_fast" and func.has_kernel_for_dispatch_key(explicit):
            with self:
                return func._op_dk(explicit, *args, **kwargs)
        return self._gpu.run(func, args, kwargs)


class _Functions(TorchFunctionMode):
    """Names the number of the device, for which PyTorch would ask CUDA; functions that need no device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return moved_to(args[0], DEVICE, *args[2:], **kwargs)
        if func is torch.Tensor.to:
            return moved_to(*args, **kwargs)
        if func is not torch.device:
            args = tuple(DEVICE if isinstance(x, (str, torch.device)) and str(x) == "cuda" else x for x in args)
        if kwargs.get("device") is not None and str(kwargs["device"]) == "cuda":
            kwargs["device"] = DEVICE
        return func(*args, **kwargs)


@contextlib.contextmanager
def _captured(graph: Graph, pool: object = None, stream: object = None, **options: object) -> Iterator[None]:
    gpu = current()
    assert gpu.capture is None, "captures one within the other"
    gpu.capture = graph
    try:
        yield
    finally:
        gpu.capture = None
    graph.end()


@contextlib.contextmanager
def _nothing(*args: object, **kwargs: object) -> Iterator[None]:
    yield


def _replacements(gpu: SimulatedGPU) -> dict[str, Any]:
    """Of ``torch.cuda``."""
    stream = Stream()
    properties = types.SimpleNamespace(
        name="simulated", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132
    )
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "simulated",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "device": _nothing,
        "device_of": _nothing,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": _captured,
        "graph_pool_handle": lambda: (0, 1),
        "stream": _nothing,
        "current_stream": lambda device=None: stream,
        "synchronize": lambda device=None: gpu.wait(),
        "is_current_stream_capturing": lambda: gpu.capture is not None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
    }


def _made_on_cpu(function: Any) -> Any:
    """A function that makes a tensor below the modes, and so cannot on the GPU."""

    def run(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = function(data, **kwargs)
        return made if device is None else moved_to(made, torch.device(device))

    return run


def _for_cpu(function: Any) -> Any:
    """A function of the type of a device, of which there is no other."""
    return lambda device, *args, **kwargs: function("cpu", *args, **kwargs)


def _moved(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """``Module._apply``, with new parameters: one of the CPU cannot become one of the GPU. What is shared stays so."""
    new: dict[torch.Tensor, torch.Tensor] = {}

    def changed(x: torch.Tensor) -> torch.Tensor:
        if x not in new:
            with torch.no_grad():
                new[x] = change(x)
            if isinstance(x, torch.nn.Parameter):
                new[x] = torch.nn.Parameter(new[x], x.requires_grad)
            if x.grad is not None:
                new[x].grad = change(x.grad)
        return new[x]

    for part in module.modules():
        for named in (part._parameters, part._buffers):
            named.update({name: changed(x) for name, x in named.items() if x is not None})
    return module


@contextlib.contextmanager
def simulated_gpu() -> Iterator[SimulatedGPU]:
    """Within the block there is one."""
    gpu = SimulatedGPU()
    registered = _cuda.registered

    def is_registered(operator: str, key: str) -> bool:
        return operator in emulated_cuda.OPERATORS if key == "CUDA" else registered(operator, key)

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for name, value in _replacements(gpu).items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.nn.Module, "_apply", _moved)
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, _made_on_cpu(getattr(torch, name)))
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
            patch.setattr(torch, name, _for_cpu(getattr(torch, name)))
        patch.setattr(_cuda, "registered", is_registered)
        patch.setattr(_cuda, "too_old", lambda device: None)
        patch.setattr("minilm_fast.ops._triton.too_old", lambda device: None)
        make_current(gpu)
        # Threads of the backward pass would not know the modes.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_Functions())
        stack.enter_context(_Dispatch(gpu))
        try:
            yield gpu
        finally:
            make_current(None)
