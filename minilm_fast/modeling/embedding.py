"""Sentence embeddings: one vector a text, from the last hidden states of the packed encoder.

What sentence-transformers computes for a checkpoint of its layout (Reimers and Gurevych, arXiv:1908.10084): the tokens
cut to ``max_seq_length``, pooled over the tokens of the text, special tokens included, and normalised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilm_fast import ops
from minilm_fast.config import read_json
from minilm_fast.data.parallel import ordered_map
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.errors import UserError
from minilm_fast.modeling.packed_encoder import PackedEncoder
from minilm_fast.ops.pool import POOLINGS
from minilm_fast.tokenization import Tokenizer

SETTINGS_FILES = (
    *("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"),
    "config_sentence_transformers.json",
)
DEFAULT_BATCH_SIZE = 64
# Special tokens around a text.
_SPECIALS = 2


@dataclass(frozen=True)
class EmbeddingSettings:
    """How hidden states become a vector.

    Attributes:
        pooling: ``"mean"`` or ``"max"`` over the tokens of a text, or ``"cls"``, its first token.
        normalize: whether vectors are divided by their Euclidean norm.
        max_seq_length: tokens of a text, special tokens included; longer ones are cut. None: as many as the model
            has positions.
        lower_case: whether texts are lower-cased before the tokenizer sees them, whatever that does itself.
        prompts: what a checkpoint wants before a text, by name.
        default_prompt_name: which of them comes before a text where none is asked for; None: none.
        pools_prompt: whether the tokens of a prompt are pooled with the text's; the only way that is supported.
    """

    pooling: str = "mean"
    normalize: bool = True
    max_seq_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    pools_prompt: bool = True

    def prompt(self, text: str | None, name: str | None) -> str:
        """What comes before each text: ``text``, or the prompt of a name, by default that of the default name.

        Raises:
            UserError: both are given, there is no prompt of that name, or its tokens are not to be pooled.
        """
        if text is not None and name is not None:
            raise UserError("prompt and prompt_name exclude one another")
        if text is None:
            name = self.default_prompt_name if name is None else name
            if name is not None and name not in self.prompts:
                known = ", ".join(map(repr, self.prompts)) or "none"
                raise UserError(f"prompt_name {name!r}: the checkpoint has no such prompt ({known})")
            text = self.prompts[name] if name is not None else ""
        if text and not self.pools_prompt:
            raise UserError("the checkpoint pools without the tokens of a prompt, which is not supported")
        return text

    def checked(self, positions: int) -> EmbeddingSettings:
        """The settings with ``max_seq_length`` filled in for a model with so many positions.

        Raises:
            UserError: one is out of range.
        """
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        length = positions if self.max_seq_length is None else self.max_seq_length
        if not _SPECIALS < length <= positions:
            raise UserError(f"max_seq_length must be from {_SPECIALS + 1} to the model's {positions}, got {length}")
        return replace(self, max_seq_length=length)


def read_settings(folder: Path) -> EmbeddingSettings:
    """The settings that a folder of sentence-transformers' layout records; else the defaults.

    Raises:
        UserError: a file cannot be read, or the folder asks for a module or a pooling that is not supported.
    """
    length, lower_case = _transformer_settings(folder / SETTINGS_FILES[1])
    prompts, name = _prompts(folder / SETTINGS_FILES[3])
    settings = EmbeddingSettings(
        max_seq_length=length, lower_case=lower_case, prompts=prompts, default_prompt_name=name
    )
    modules = folder / SETTINGS_FILES[0]
    if not modules.is_file():
        return settings
    settings = replace(settings, normalize=False)
    for module in _modules(modules):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling, pools_prompt = _pooling(folder / str(module.get("path", "")) / "config.json")
            settings = replace(settings, pooling=pooling, pools_prompt=pools_prompt)
        elif kind == "Normalize":
            settings = replace(settings, normalize=True)
        elif kind != "Transformer":
            raise UserError(f"{modules}: the module {kind!r} is not supported (Transformer, Pooling, Normalize are)")
    return settings


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    if not path.is_file():
        return {}, None
    values = read_json(path)
    prompts, name = values.get("prompts") or {}, values.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise UserError(f"{path}: prompts must be texts by name")
    if name is not None and (not isinstance(name, str) or name not in prompts):
        raise UserError(f"{path}: default_prompt_name {name!r} is the name of no prompt")
    return {key: text or "" for key, text in prompts.items()}, name


def _transformer_settings(path: Path) -> tuple[int | None, bool]:
    if not path.is_file():
        return None, False
    values = read_json(path)
    length, lower_case = values.get("max_seq_length"), values.get("do_lower_case", False)
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length <= _SPECIALS):
        raise UserError(f"{path}: max_seq_length must be an integer above {_SPECIALS}, found {length!r}")
    if not isinstance(lower_case, bool):
        raise UserError(f"{path}: do_lower_case must be true or false, found {lower_case!r}")
    return length, lower_case


def _modules(path: Path) -> list[dict[str, Any]]:
    import json

    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{path}: must be a list of modules")
    return modules


def _pooling(path: Path) -> tuple[str, bool]:
    if not path.is_file():
        return "mean", True
    values = read_json(path)
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}
    chosen = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    if isinstance(values.get("pooling_mode"), str):
        chosen = [key for key, name in names.items() if name == values["pooling_mode"]] or [values["pooling_mode"]]
    if len(chosen) != 1 or chosen[0] not in names:
        raise UserError(f"{path}: pooling by {', '.join(chosen) or 'nothing'} is not supported (mean, cls or max is)")
    return names[chosen[0]], values.get("include_prompt", True) is not False


def encode_tokens(
    texts: Sequence[str], tokenizer: Tokenizer, max_seq_length: int, lower_case: bool = False, prompt: str = ""
) -> list[list[int]]:
    """Ids of texts behind a prompt, lower-cased if that is wanted, special tokens added, cut to a length."""
    limit = max_seq_length - _SPECIALS
    texts = [prompt + text for text in texts] if prompt else texts
    texts = [text.lower() for text in texts] if lower_case else texts
    return [
        [tokenizer.cls_id, *tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)[:limit]), tokenizer.sep_id]
        for text in texts
    ]


class Embedder:
    """Turns texts into vectors.

    Args:
        encoder: all layers of a model.
        tokenizer: its tokenizer.
        settings: checked ones.
        prompt: what comes before each text.
    """

    def __init__(
        self, encoder: PackedEncoder, tokenizer: Tokenizer, settings: EmbeddingSettings, prompt: str = ""
    ) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._settings = settings
        self._prompt = prompt

    def blocks(self, texts: Iterable[str], batch_size: int, num_proc: int = 1) -> Iterator[np.ndarray]:
        """Vectors of a stream of texts, a batch at a time, in order: fp32 ``[at most batch_size, hidden]``.

        A few batches are held at a time. The next ones are tokenised while one is computed.

        Args:
            num_proc: processes that tokenise; with 1 it is a thread of this process.

        Raises:
            UserError: ``batch_size`` or ``num_proc`` is below 1, or a text is no string.
        """
        for name, value in (("batch_size", batch_size), ("num_proc", num_proc)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        length = self._settings.max_seq_length
        assert length is not None
        function = partial(
            encode_tokens,
            tokenizer=self._tokenizer,
            max_seq_length=length,
            lower_case=self._settings.lower_case,
            prompt=self._prompt,
        )
        batches = _batches(texts, batch_size)
        tokenized = ordered_map(function, batches, num_proc, "texts") if num_proc > 1 else _ahead(function, batches)
        for ids in tokenized:
            yield self.vectors(ids)

    @torch.no_grad()
    def vectors(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors of texts given as ids: fp32 ``[texts, hidden]``."""
        batch = TokenBatch.from_sequences(ids).to(self._encoder.device)
        hidden = self._encoder.hidden_states(batch.input_ids, batch.position_ids, batch.layout).float()
        settings = self._settings
        return ops.pool_sequences(hidden, batch.layout, settings.pooling, settings.normalize).cpu().numpy()


def _batches(texts: Iterable[str], batch_size: int) -> Iterator[list[str]]:
    stream, done = iter(texts), 0
    while batch := list(islice(stream, batch_size)):
        for place, text in enumerate(batch, done):
            if not isinstance(text, str):
                raise UserError(f"text {place} must be a string, got {type(text).__name__}")
        yield batch
        done += len(batch)


def _ahead(function: Any, items: Iterable[Any]) -> Iterator[Any]:
    """``function`` of every item, in order, one ahead of what is asked for, in a thread."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for item in items:
            started = thread.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = started
        if waiting is not None:
            yield waiting.result()
