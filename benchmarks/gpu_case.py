"""What a case of ``gpu.py`` is: systems that compute the same thing, what it takes at least, and what is aimed at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from shapes import ModelShape

OURS = "ours"
"""The name of every system of ours begins so."""
CHECKED = 4
"""Sequences whose results are compared with fp64."""


class System:
    """Something to time.

    Args:
        make: builds the function to time. It is called at the first run, so that a system which cannot be built is
            told apart from the others.
        result: from what the function returned to the tensors to compare, in the layout that the systems of a case
            share; None: it returns them itself.
        check: gives those tensors in place of a run, where what is timed draws random numbers or changes weights.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[], Any]],
        result: Callable[[Any], Sequence[torch.Tensor]] | None = None,
        check: Callable[[], Sequence[torch.Tensor]] | None = None,
    ) -> None:
        self._make = make
        self._result = result
        self._check = check
        self._run: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        if self._run is None:
            self._run = self._make()
        return self._run()

    def results(self) -> list[torch.Tensor]:
        """What the system computes."""
        if self._check is not None:
            return list(self._check())
        found = self()
        if self._result is not None:
            return list(self._result(found))
        return [found] if isinstance(found, torch.Tensor) else list(found)


@dataclass(frozen=True)
class Goal:
    """A figure to reach.

    ``kind`` is one of ``"ms"`` (at most, of ours, a unit), ``"a second"`` (units, at least), ``"times"`` (as fast as
    ``peer``, at least), ``"of the limit"`` (at least) and ``"peak MB"`` (at most).
    """

    kind: str
    bound: float
    peer: str = ""

    def __str__(self) -> str:
        bound = f"{self.bound:g}"
        if self.kind == "times":
            return f"at least {bound}x {self.peer}"
        if self.kind == "of the limit":
            return f"at least {self.bound:.0%} of the limit"
        return f"{'at least' if self.kind == 'a second' else 'at most'} {bound} {self.kind}"


@dataclass
class Case:
    """Systems side by side.

    Attributes:
        exact: what they compute, in fp64 (or the nearest that there is); None: nothing can be compared.
        different: systems that compute something else of the same size, whose results are not compared.
        operations, bytes: what it takes at least.
        units, unit: what a rate is given of.
        goals: what is aimed at on ``GOAL_DEVICE`` at the size that ``gpu.py`` takes by default.
    """

    name: str
    systems: dict[str, System]
    exact: Callable[[], Sequence[torch.Tensor]] | None = None
    different: frozenset[str] = frozenset()
    operations: float = 0.0
    bytes: float = 0.0
    units: float = 0.0
    unit: str = ""
    goals: list[Goal] = field(default_factory=list)


@dataclass(frozen=True)
class Size:
    """How large the cases are; ``compiler`` is the backend of torch.compile for the peers."""

    shape: ModelShape
    batch: int
    source: int
    target: int
    beams: int
    steps: int
    dtype: torch.dtype
    device: torch.device
    compiler: str = "inductor"

    @property
    def head_size(self) -> int:
        return self.shape.hidden // self.shape.heads

    @property
    def format(self) -> str:
        """The name of the dtype."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    def compile(self, function: Any) -> Any:
        """The function, or module, compiled as the peers are."""
        return torch.compile(function, backend=self.compiler)


def replayed(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A function whose tensors stay in place; on a GPU as a CUDA graph, which is how a decoding step runs.

    Started from Python, kernels of a few microseconds would wait for the host.
    """
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()

    def run() -> Any:
        graph.replay()
        return found

    return run


def differentiated(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], gradient: torch.Tensor | None = None
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A function without arguments: the result and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def run() -> tuple[torch.Tensor, ...]:
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, gradient)

    return run
