"""What CUDA tensors run besides Triton: the C++ kernels of ``csrc/cuda``, and PyTorch's own operators put together.

The plain products stay with cuBLAS, around which ``linear`` rounds, adds the bias and applies the activation. Nothing
here waits for the device, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from minilm_fast.ops import reference
from minilm_fast.ops._compile import constant

DIFFERENTIABLE = {"attention", "projected_attention", "relation_kl"}
"""The operators with C++ kernels of the backward pass too."""
KERNELS = {
    *DIFFERENTIABLE,
    *("decode_attention", "store_source", "lm_head_topk", "ban_repeated_ngrams", "advance_beams"),
    *("step_linear", "step_norm", "step_embedding", "decode_attention_early"),
}
"""The operators with C++ kernels."""
COMPOSED = {"pack_weight", "linear", "add_layer_norm", "embed_layer_norm", "pool_sequences", "adamw"}
"""The operators put together from others."""
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The formats of a packed weight that there are on CUDA: the weight in that dtype."""
HEAD_SIZES = (32, 64, 128)
MOST_CANDIDATES = 16
MOST_BIAS_DISTANCE = 1024
"""Up to this distance the CUDA kernels give a gradient of the relative bias."""
MOST_BEAMS = 64
_LEAST_CAPABILITY = (8, 0)


@constant
def registered(operator: str, key: str) -> bool:
    """Whether an operator has a kernel of its own under a dispatch key, ``"CPU"`` or ``"CUDA"``.

    Asked for after the extension has been loaded.
    """
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"minilm_fast::{operator}", key)


@constant
def too_old(device: torch.device) -> str | None:
    """Why the kernels for GPUs cannot run on a CUDA device; None if they can."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= _LEAST_CAPABILITY:
        return None
    return f"{device} has compute capability {capability[0]}.{capability[1]}, below 8.0"


def unusable(operator: str, device: torch.device) -> str | None:
    """Why no CUDA implementation can run an operator on a device, but for the extension; None if one can."""
    if operator not in KERNELS | COMPOSED:
        return f"{operator} has no cuda implementation yet"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if operator in COMPOSED:
        return None
    if not registered(operator, "CUDA"):
        return "the compiled extension was built without CUDA"
    return too_old(device)


def refuse_format(format: str) -> dict[str, str | None]:
    """Why a packed weight of this format cannot be had."""
    if format == "fp16":
        return {"cpu": "the C++ kernels for the CPU have no format fp16"}
    return {"cuda": None if format in FORMATS else f"the format {format} is not fp32, bf16 or fp16"}


def kernel_head_size(size: int) -> int:
    """The head size of the kernels that heads of another one are filled up to; the same if there is none."""
    return next((kernels for kernels in HEAD_SIZES if kernels >= size), size)


def refuse_attention(q: torch.Tensor) -> dict[str, str | None]:
    """Why the CUDA kernel of attention cannot run for these queries."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return {"cuda": f"the tensors are {q.dtype}, not fp16 or bf16"}
    if q.shape[-1] > HEAD_SIZES[-1]:
        return {"cuda": f"the head size {q.shape[-1]} is above {HEAD_SIZES[-1]}"}
    return {"cuda": None}


def refuse_relation(teacher: torch.Tensor, student: torch.Tensor) -> dict[str, str | None]:
    """Why the CUDA kernels cannot compute the loss of a relation."""
    if teacher.dtype != student.dtype or student.dtype not in (torch.float16, torch.bfloat16):
        return {"cuda": f"the tensors are {teacher.dtype} and {student.dtype}, not both fp16 or bf16"}
    for x in (teacher, student):
        if not 8 <= x.shape[-1] <= 128 or x.shape[-1] % 8 != 0:
            return {"cuda": f"the head size {x.shape[-1]} is not a multiple of 8 between 8 and 128"}
    return {}


def refuse_decode(q: torch.Tensor, cache: torch.Tensor) -> dict[str, str | None]:
    """Why the CUDA kernels of decoding cannot run for these queries (or keys) and this cache."""
    if q.dtype != cache.dtype or q.dtype not in FORMATS.values():
        return {"cuda": f"the tensors are {q.dtype} and the caches {cache.dtype}, not both fp16, bf16 or fp32"}
    if q.shape[-1] not in HEAD_SIZES:
        return {"cuda": f"the head size {q.shape[-1]} is none of 32, 64 and 128"}
    return {}


def refuse_beams(beams: int) -> dict[str, str | None]:
    """Why the CUDA kernel of a search's step cannot run for so many hypotheses of an example."""
    return {"cuda": f"there are {beams} beams, above {MOST_BEAMS}" if beams > MOST_BEAMS else None}


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """:func:`minilm_fast.ops.linear` in the dtype of the weight."""
    from minilm_fast.ops.norm import bias_gelu

    rounded = x.to(weight.dtype)
    if activation == "gelu":
        return bias_gelu(F.linear(rounded, weight), bias).to(x.dtype)
    return F.linear(rounded, weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """:func:`minilm_fast.ops.add_layer_norm` through the kernel of training."""
    from minilm_fast.ops.norm import dropout_add_layer_norm

    return dropout_add_layer_norm(x, residual, weight, bias, eps)


def adamw(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    means: list[torch.Tensor],
    squares: list[torch.Tensor],
    step_size: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """:func:`minilm_fast.ops.adamw` of many tensors by PyTorch's operators on lists, in the specification's order."""
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, eps)
    torch._foreach_addcdiv_(params, means, roots, -step_size)
    torch._foreach_mul_(params, decay)


def pool_sequences(hidden: torch.Tensor, cu_seqlens: torch.Tensor, pooling: str, normalize: bool) -> torch.Tensor:
    """:func:`minilm_fast.ops.pool_sequences`, each sum in the order of the tokens."""
    if pooling == "cls":
        return reference.pool_sequences(hidden, cu_seqlens, pooling, normalize)
    lengths = cu_seqlens.long().diff()
    # Unchecked: the lengths would be copied to the host.
    out = torch.segment_reduce(hidden, pooling, lengths=lengths, axis=0, unsafe=True)
    out = out.masked_fill((lengths == 0)[:, None], 0.0)
    return F.normalize(out, dim=1) if normalize else out
