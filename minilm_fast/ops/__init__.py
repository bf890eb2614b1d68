"""Operators of minilm_fast (``torch.ops.minilm_fast.*``), one file each; ``reference`` is their specification."""

from minilm_fast.ops._cuda import kernel_head_size
from minilm_fast.ops._dispatch import backend, forced_backend, noted_fallbacks
from minilm_fast.ops.adamw import adamw, adamw_of_many
from minilm_fast.ops.attention import attention, projected_attention
from minilm_fast.ops.beam import BeamRules, BeamState, advance_beams, ban_repeated_ngrams
from minilm_fast.ops.decode_attention import decode_attention, store_source
from minilm_fast.ops.encoder import EncoderLayer, EncoderStack, encoder_layers
from minilm_fast.ops.layout import SequenceLayout
from minilm_fast.ops.linear import PackedWeight, linear, lm_head_topk, pack_weight
from minilm_fast.ops.loss import label_smoothed_cross_entropy
from minilm_fast.ops.norm import add_layer_norm, bias_gelu, dropout_add_layer_norm, embed_layer_norm
from minilm_fast.ops.padded_attention import padded_attention
from minilm_fast.ops.pool import pool_sequences
from minilm_fast.ops.relation_kl import relation_kl
from minilm_fast.ops.step import kernels_can_overlap, step_embedding, step_kernels_take, step_linear, step_norm

__all__ = [
    "BeamRules",
    "BeamState",
    "EncoderLayer",
    "EncoderStack",
    "PackedWeight",
    "SequenceLayout",
    "adamw",
    "adamw_of_many",
    "add_layer_norm",
    "advance_beams",
    "attention",
    "backend",
    "ban_repeated_ngrams",
    "bias_gelu",
    "decode_attention",
    "dropout_add_layer_norm",
    "embed_layer_norm",
    "encoder_layers",
    "forced_backend",
    "kernel_head_size",
    "kernels_can_overlap",
    "label_smoothed_cross_entropy",
    "linear",
    "lm_head_topk",
    "noted_fallbacks",
    "pack_weight",
    "padded_attention",
    "pool_sequences",
    "projected_attention",
    "relation_kl",
    "step_embedding",
    "step_kernels_take",
    "step_linear",
    "step_norm",
    "store_source",
]
