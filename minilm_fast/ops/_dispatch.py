"""Choice of an implementation: which backends there are, why one cannot run, and how to force one.

The torch dispatcher picks the device. On one device there may be several implementations of an operator; the
first of :data:`PRIORITY` that can run is taken. The reasons why the ones before it could not are kept: they are
in the error when a backend is forced that cannot run, and in the one warning when a slow path is taken.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator, Mapping

import torch

from minilm_fast.errors import UserError
from minilm_fast.ops import _cuda, _triton
from minilm_fast.ops._extension import EXTENSION_ERROR, OUTDATED

PRIORITY = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# On CUDA the Triton kernels of these come first: it has not been measured yet which are faster.
_TRITON_FIRST = {"attention", "projected_attention", "relation_kl"}
BACKENDS = ("reference", "cpu", "triton", "cuda")
# Operators whose C++ kernel has a backward.
DIFFERENTIABLE = {
    "attention",
    "bias_gelu",
    "dropout_add_layer_norm",
    "label_smoothed_cross_entropy",
    "projected_attention",
    "relation_kl",
}

_NO_REFUSALS: Mapping[str, str | None] = {}
_local = threading.local()
_warned: set[str] = set()


class BackendError(UserError, RuntimeError):
    """A forced backend cannot run an operator; the message says why."""


def _environment_backend() -> str | None:
    name = os.environ.get("MINILM_FAST_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise UserError(f"MINILM_FAST_BACKEND={name}: must be one of {', '.join(BACKENDS)}")
    return name


_default_backend = _environment_backend()


def forced_backend() -> str | None:
    """The backend forced by :func:`backend` in this thread, else by ``MINILM_FAST_BACKEND``, else None."""
    return getattr(_local, "backend", None) or _default_backend


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Forces every operator called in the block (in this thread) to one backend; None lifts a forced one.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"`` or None.

    Raises:
        ValueError: the name is unknown.
        BackendError: raised by the operator, when the forced backend cannot run it; the message says why.
    """
    global _default_backend
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: must be one of {', '.join(BACKENDS)}")
    before, default = getattr(_local, "backend", None), _default_backend
    _local.backend = name
    if name is None:
        _default_backend = None
    try:
        yield
    finally:
        _local.backend, _default_backend = before, default


@contextlib.contextmanager
def noted_fallbacks() -> Iterator[set[str]]:
    """Gives the names of the operators that run as the pure-PyTorch specification in the block, in this thread.

    Many of these wait for the device, so that no CUDA graph can be captured of them.
    """
    before = getattr(_local, "fallbacks", None)
    noted: set[str] = set()
    _local.fallbacks = noted
    try:
        yield noted
    finally:
        _local.fallbacks = before


def unusable(name: str, operator: str, device: torch.device, needs_grad: bool = False) -> str | None:
    """Why a backend cannot run an operator on tensors of a device; None if it can."""
    if name == "reference":
        return None
    if name == "triton":
        return _triton.unusable(operator, device)
    if name == "cuda":
        if operator in _cuda.KERNELS and device.type == "cuda" and EXTENSION_ERROR is not None:
            return EXTENSION_ERROR
        if operator in _cuda.KERNELS - _cuda.DIFFERENTIABLE and needs_grad:
            return f"the CUDA kernel of {operator} has no backward and a gradient is asked for"
        return _cuda.unusable(operator, device)
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    if EXTENSION_ERROR is not None:
        return EXTENSION_ERROR
    if not _cuda.registered(operator, "CPU"):
        return f"the compiled extension was built from sources that lack {operator}"
    if needs_grad and operator not in DIFFERENTIABLE:
        return f"the C++ kernel of {operator} has no backward and a gradient is asked for"
    return None


def select(operator: str, *tensors: torch.Tensor | None, refusals: Mapping[str, str | None] = _NO_REFUSALS) -> str:
    """Picks the backend that runs ``operator`` on these tensors.

    Args:
        refusals: why a backend that has the operator cannot run this call of it, for instance its head size.

    Raises:
        BackendError: a forced backend cannot run it.
    """
    device = next(t.device for t in tensors if t is not None)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    forced = forced_backend()
    if forced is not None:
        reason = unusable(forced, operator, device, needs_grad) or refusals.get(forced)
        if reason is not None:
            raise BackendError(f"backend {forced!r} cannot run {operator}: {reason}")
        if forced == "reference":
            _note(operator)
        return forced
    reasons: list[str] = []
    names = PRIORITY.get(device.type, ("reference",))
    if device.type == "cuda" and operator in _TRITON_FIRST:
        names = ("triton", "cuda", "reference")
    for name in names:
        reason = unusable(name, operator, device, needs_grad) or refusals.get(name)
        if reason is None:
            if name == "reference":
                _note(operator)
                if reasons and not needs_grad:
                    _warn_once(operator, device.type, reasons)
            return name
        reasons.append(f"{name}: {reason}")
    raise AssertionError("the reference runs everywhere")


def _note(operator: str) -> None:
    noted = getattr(_local, "fallbacks", None)
    if noted is not None:
        noted.add(operator)


def _warn_once(operator: str, device: str, reasons: list[str]) -> None:
    key = "extension" if EXTENSION_ERROR is not None and device == "cpu" else f"{operator} on {device}"
    if key in _warned or (key == "extension" and OUTDATED):
        return
    _warned.add(key)
    what = "all operators run" if key == "extension" else f"{operator} runs"
    warnings.warn(f"{what} in plain PyTorch, which is slower: {'; '.join(reasons)}", RuntimeWarning, stacklevel=4)
