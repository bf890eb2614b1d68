"""The attention implementation ``"minilm_fast"`` of transformers.

Importing this module registers it; ``AutoModel.from_pretrained(name, attn_implementation="minilm_fast")`` then runs
self-attention on the packed tokens of a batch, without its padding and without a matrix of the square of its length.

What :func:`minilm_fast.ops.padded_attention` cannot express runs through transformers' own ``sdpa`` or ``eager``, and
one warning for each reason says so.
"""

from __future__ import annotations

import inspect
import logging
import sys
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from minilm_fast import ops
from minilm_fast.errors import UserError
from minilm_fast.ops.dropout import draw_seeds
from minilm_fast.ops.padded_attention import remember_packing

NAME = "minilm_fast"
OLDEST = 5
"""The first major version of transformers whose BERT family asks the registered implementation for its mask."""

logger = logging.getLogger(__name__)
_warned: set[str] = set()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TOKENS = "_minilm_fast_tokens"
_UNSUPPORTED = ("softcap", "s_aux", "head_mask")
# What a module of self-attention takes. One that takes more may attend to the states of another sequence.
_SELF_ATTENTION_ARGUMENTS = {
    "self",
    "hidden_states",
    "attention_mask",
    "cache",
    "cache_position",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "output_attentions",
    "use_cache",
}


def register() -> None:
    """Makes ``attn_implementation="minilm_fast"`` known to transformers; a second call changes nothing.

    Raises:
        UserError: the version of transformers is too old.
    """
    version = transformers.__version__
    if int(version.split(".")[0]) < OLDEST:
        raise UserError(f"attn_implementation {NAME!r} needs transformers {OLDEST} or newer, found {version}")
    from transformers.masking_utils import AttentionMaskInterface

    transformers.AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """What transformers passes on to :func:`attention` as the mask.

    Returns:
        bool ``[batch, length]``, True at tokens, where every token sees every other; ``[batch, 1, length]`` where it
        sees itself and those before it only; None where there is no padding; else the matrix of ``sdpa``.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    causal = mask_function is None or mask_function is causal_mask_function
    whole = isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0 and q_length == kv_length
    fits = attention_mask is None or attention_mask.shape == (batch_size, kv_length)
    if not (whole and fits and (causal or mask_function is bidirectional_mask_function)):
        if mask_function is not None:
            options["mask_function"] = mask_function
        matrix: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            device=device,
            **options,
        )
        return matrix
    may_skip = (
        options.get("allow_is_causal_skip", True) if causal else options.get("allow_is_bidirectional_skip", False)
    )
    if attention_mask is None:
        if may_skip:
            return None
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    tokens = attention_mask.to(device=device, dtype=torch.bool, copy=True)
    if torch.compiler.is_compiling():
        return tokens[:, None] if causal else tokens
    # A copy that nobody else changes: all layers of this pass may share what is found in it.
    remember_packing(tokens)
    if not causal:
        return tokens
    column = tokens[:, None]
    setattr(column, _TOKENS, tokens)
    return column


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' interface of an attention implementation.

    Args:
        query, key, value: ``[batch, heads, length, head_dim]``.
        attention_mask: from :func:`attention_mask`, or a matrix ``[batch, 1 or heads, queries, keys]``.

    Returns:
        ``[batch, length, heads, head_dim]``, 0 at padding; and the probabilities if ``output_attentions`` is set.

    Raises:
        ValueError: an argument that no fall-back computes either (``softcap``, ``s_aux``, ``head_mask``).
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation {NAME!r} does not support {name}")
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))
    tokens = attention_mask
    if attention_mask is not None:
        causal = attention_mask.dim() == 3
        tokens = getattr(attention_mask, _TOKENS, attention_mask[:, 0]) if causal else attention_mask
    reason = _refusal(module, query, key, value, tokens, kwargs)
    if reason is not None:
        _warn_once(reason)
        return _fall_back(module, query, key, value, attention_mask, causal, dropout, scaling, kwargs)
    out = ops.padded_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        tokens,
        causal=causal,
        scale=scaling,
        dropout=dropout,
        seed=draw_seeds(1) if dropout > 0 else None,
    )
    return out, None


def _refusal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, tokens: Tensor | None, kwargs: dict[str, Any]
) -> str | None:
    """Why the operator cannot compute this call; None if it can."""
    if kwargs.get("output_attentions"):
        return "the probabilities are asked for (output_attentions), which it does not keep"
    if kwargs.get("position_bias") is not None:
        return "a bias of positions is added to the scores"
    if query.shape[-2] != key.shape[-2]:
        return "queries and keys differ in number (a cache, or attention to another sequence)"
    if query.shape != key.shape or query.shape != value.shape:
        return "queries, keys and values differ in their heads"
    if tokens is not None and tokens.dim() != 2:
        return "the mask is a matrix, not one of padding"
    if query.dtype not in _DTYPES:
        return f"the tensors are of type {query.dtype}"
    if tokens is not None and not _is_self_attention(type(module)):
        return f"{type(module).__name__} may attend to another sequence, whose padding is not that of the queries"
    return None


@torch.compiler.assume_constant_result
def _is_self_attention(kind: type[nn.Module]) -> bool:
    """Whether queries and keys are surely of one sequence, so that padding of the one is padding of the other."""
    parameters = inspect.signature(kind.forward).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return named <= _SELF_ATTENTION_ARGUMENTS


def _warn_once(reason: str) -> None:
    if not torch.compiler.is_compiling() and reason not in _warned:
        _warned.add(reason)
        logger.warning("attn_implementation %r leaves this attention to transformers' own: %s", NAME, reason)


def _fall_back(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    matrix = attention_mask
    if attention_mask is not None and attention_mask.dim() < 4:
        matrix = attention_mask.view(attention_mask.shape[0], 1, 1, -1)
        if causal:
            matrix = matrix & _causal_matrix(query, key)
    if not kwargs.get("output_attentions"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        sdpa: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, matrix, dropout=dropout, scaling=scaling, is_causal=causal, **kwargs
        )
        return sdpa
    if attention_mask is None and causal and query.shape[-2] > 1:
        matrix = _causal_matrix(query, key)
    if matrix is not None and matrix.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        matrix = torch.zeros(matrix.shape, dtype=query.dtype, device=query.device).masked_fill_(~matrix, lowest)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(f"{type(module).__name__} has no eager attention to give output_attentions")
    result: tuple[Tensor, Tensor] = eager(module, query, key, value, matrix, dropout=dropout, scaling=scaling, **kwargs)
    return result


def _causal_matrix(query: Tensor, key: Tensor) -> Tensor:
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()[None, None]


register()
