"""What torch.compile is told of the choice of an implementation, which it cannot look into."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def constant(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a function whose result for given arguments never changes while the process runs.

    It is called once for each choice of arguments, and torch.compile takes its result for a constant.
    """
    cached = functools.cache(function)

    # Dynamo looks through a cache at the function in it, so the mark must be outside.
    @torch.compiler.assume_constant_result
    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return cached(*args, **kwargs)  # type: ignore[arg-type]

    return run
