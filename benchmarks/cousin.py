"""The size-matched stand-in for peers that cannot run the ``[MASK]``-query model.

No maintained system runs UniLM's decoder, so the peers run a BART of the same width, with as many encoder layers and
as many decoder layers as the measured model has layers, and random weights. Its work per sequence is close to the
measured model's (``work.py`` counts both). It is another model: only costs can be compared, never outputs.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shapes import ModelShape

HUGGINGFACE_FOLDER = "bart-huggingface"
CTRANSLATE_FOLDER = "bart-ctranslate2"
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")


def word(token: int) -> str:
    """The name of a token id in the cousin's vocabulary."""
    return SPECIALS[token] if token < len(SPECIALS) else f"w{token}"


def create(shape: ModelShape, seed: int) -> Any:
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(seed)
    config: Any = BartConfig(
        vocab_size=shape.vocab,
        max_position_embeddings=shape.positions,
        d_model=shape.hidden,
        encoder_layers=shape.layers,
        decoder_layers=shape.layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.intermediate,
        decoder_ffn_dim=shape.intermediate,
        activation_function="gelu",
        forced_eos_token_id=None,
    )
    # Read by CTranslate2's converter alone: layers normalise after the residual, embeddings are normalised too.
    config.normalize_before, config.normalize_embedding = False, True
    return BartForConditionalGeneration(config).eval()


def prepare(shape: ModelShape, seed: int, folder: Path, with_ctranslate2: bool) -> None:
    """Write the cousin as a transformers folder and, if asked for, as a CTranslate2 folder."""
    source = folder / HUGGINGFACE_FOLDER
    create(shape, seed).save_pretrained(source)
    if with_ctranslate2:
        _convert(shape, source, folder / CTRANSLATE_FOLDER)


def _convert(shape: ModelShape, source: Path, target: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        """The cousin has no tokenizer files; its vocabulary is given here."""

        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
            return SimpleNamespace(
                get_vocab=lambda: {word(token): token for token in range(shape.vocab)},
                convert_ids_to_tokens=word,
                bos_token="<s>",
                eos_token="</s>",
                unk_token="<unk>",
            )

    Converter(str(source)).convert(str(target))
