"""The checkpoint that training starts from."""

from __future__ import annotations

from minilm_fast import checkpoint
from minilm_fast.checkpoint import LoadedCheckpoint
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer


def load_with_tokenizer(
    name: str,
    *,
    config_name: str | None = None,
    tokenizer_name: str | None = None,
    cache_dir: str | None = None,
    model_type: str | None = None,
    do_lower_case: bool | None = None,
    max_seq_length: int | None = None,
    for_training: bool = False,
) -> tuple[LoadedCheckpoint, Tokenizer]:
    """A checkpoint with its tokenizer, both checked against one another.

    Token types count as in transformers: the single row of RoBERTa is added to the positions.

    Args:
        name: folder, weights file or hub id.
        model_type: the family, where the checkpoint does not say.
        do_lower_case: None leaves it to the tokenizer's own settings.
        max_seq_length: must fit the checkpoint's positions.

    Raises:
        UserError: something is missing, or does not belong together.
    """
    resolved = checkpoint.resolve(name, config_name=config_name, tokenizer_name=tokenizer_name, cache_dir=cache_dir)
    if resolved.tokenizer is None:
        raise UserError(f"{name} holds no vocabulary: give --tokenizer_name")
    loaded = checkpoint.load(
        resolved.weights,
        config=resolved.config,
        model_type=model_type,
        for_training=for_training,
        fold_token_types=True,
    )
    tokenizer = Tokenizer.from_pretrained(
        resolved.tokenizer, model_type=loaded.config.model_type, do_lower_case=do_lower_case, cache_dir=cache_dir
    )
    checkpoint.check_tokenizer(loaded.config, loaded.tokenizer_record, tokenizer)
    positions = loaded.config.max_position_embeddings
    if max_seq_length is not None and max_seq_length > positions:
        raise UserError(f"--max_seq_length {max_seq_length}: {name} has {positions} positions")
    return loaded, tokenizer
