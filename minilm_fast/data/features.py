"""From examples to token ids."""

from __future__ import annotations

from collections.abc import Iterable

from minilm_fast.data.examples import Example
from minilm_fast.data.masking import Feature, SpecialIds
from minilm_fast.tokenization import Tokenizer


def _token_ids(text: str | list[str], tokenizer: Tokenizer) -> list[int]:
    tokens = tokenizer.tokenize(text) if isinstance(text, str) else text
    return tokenizer.convert_tokens_to_ids(tokens)


def make_features(examples: Iterable[Example], tokenizer: Tokenizer) -> list[Feature]:
    """Token ids of every example, not truncated, without special tokens; lists of tokens are taken as they are."""
    return [Feature(_token_ids(e.source, tokenizer), _token_ids(e.target, tokenizer)) for e in examples]


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The ids that frame and mask a sample."""
    return SpecialIds(
        cls=tokenizer.cls_id,
        sep=tokenizer.sep_id,
        mask=tokenizer.mask_id,
        vocab_size=tokenizer.vocab_size,
    )
