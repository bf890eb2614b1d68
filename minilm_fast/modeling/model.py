"""A checkpoint, its configuration and its tokenizer, ready to decode and to embed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from minilm_fast import checkpoint, hub
from minilm_fast.config import Config
from minilm_fast.decoding.options import DTYPES, SearchOptions
from minilm_fast.decoding.result import GenerationResult, Hypothesis
from minilm_fast.decoding.search import BeamSearch, SpecialIds
from minilm_fast.errors import UserError
from minilm_fast.modeling.embedding import (
    DEFAULT_BATCH_SIZE,
    SETTINGS_FILES,
    Embedder,
    EmbeddingSettings,
    read_settings,
)
from minilm_fast.modeling.inference import InferenceEngine
from minilm_fast.modeling.packed_encoder import PackedEncoder, WeightReader
from minilm_fast.modeling.seq2seq import Seq2SeqModel
from minilm_fast.ops import forced_backend
from minilm_fast.tokenization import Tokenizer

Source = str | Sequence[str]


class Model:
    """A BERT-family model with its tokenizer.

    Attributes:
        config: shape of the model.
        state: fp32 weights by canonical name (``docs/architecture.md``).
        tokenizer: the tokenizer, or None if the checkpoint came without one.
    """

    def __init__(self, config: Config, state: dict[str, torch.Tensor], tokenizer: Tokenizer | None = None) -> None:
        self.config = config
        self.state = state
        self.tokenizer = tokenizer
        self._embedding: Callable[[], EmbeddingSettings] = EmbeddingSettings
        self._headless: UserError | None = None
        self._engines: dict[tuple[str, str | None, str], InferenceEngine] = {}
        self._encoders: dict[tuple[str, str | None, str], PackedEncoder] = {}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        config_name: str | None = None,
        tokenizer_name: str | None = None,
        model_type: str | None = None,
        do_lower_case: bool | None = None,
        cache_dir: str | None = None,
    ) -> Model:
        """Loads a model.

        Args:
            name_or_path: a folder, a hub id, or a weights file (then with ``config_name``).
            config_name: configuration, if it is not beside the weights.
            tokenizer_name: vocabulary file, folder or hub id, if it is not beside the weights.
            model_type: ``bert``, ``minilm``, ``unilm``, ``roberta``, ``xlm-roberta`` or ``electra``; by default what
                the configuration says.
            do_lower_case: for WordPiece vocabularies; by default what the checkpoint records, else False.
            cache_dir: where downloads from the hub are kept.

        Raises:
            UserError: something is missing, cut off, or does not fit together.
        """
        found = checkpoint.resolve(
            name_or_path, config_name=config_name, tokenizer_name=tokenizer_name, cache_dir=cache_dir
        )
        loaded = checkpoint.load(found.weights, config=found.config, model_type=model_type)
        tokenizer = None
        if found.tokenizer is not None:
            record = loaded.tokenizer_record
            if do_lower_case is None and record is not None:
                do_lower_case = record.get("do_lower_case")
            tokenizer = Tokenizer.from_pretrained(
                found.tokenizer,
                model_type=model_type or loaded.config.model_type,
                do_lower_case=do_lower_case,
                cache_dir=cache_dir,
            )
            checkpoint.check_tokenizer(loaded.config, record, tokenizer)
        model = cls(loaded.config, loaded.state, tokenizer)
        try:
            loaded.require_lm_head()
        except UserError as error:
            model._headless = error  # to be raised when it is to decode
        model._embedding = partial(_embedding_settings, name_or_path, found.weights.parent, cache_dir)
        return model

    @classmethod
    def from_config(cls, config: Config, tokenizer: Tokenizer | None = None, seed: int = 0) -> Model:
        """A model with random weights, the same for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = Seq2SeqModel(config)
        return cls(config, {name: tensor.detach() for name, tensor in network.state_dict().items()}, tokenizer)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model to a folder that plain transformers loads; each file whole or not at all.

        Raises:
            UserError: the folder cannot be written.
        """
        checkpoint.save(folder, self.config, self.state, self.tokenizer)

    def engine(self, dtype: str = "fp32", device: str = "cpu") -> InferenceEngine:
        """The weights packed for decoding, made at the first call for each dtype and device.

        Args:
            dtype: ``"fp32"``, ``"bf16"``, on a CPU ``"int8"``, on a GPU ``"fp16"``.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:<index>"``.

        Raises:
            UserError: unknown dtype, no such device, or a weight that decoding needs is missing.
        """
        key = self._packed_as(dtype, device)
        if key not in self._engines:
            try:
                self._engines[key] = InferenceEngine(self.config, self.state, dtype, device)
            except UserError as error:
                raise self._headless or error from None
        return self._engines[key]

    def encoder(self, dtype: str = "fp32", device: str = "cpu") -> PackedEncoder:
        """The encoder with packed weights, made at the first call for each dtype and device.

        Args:
            dtype: ``"fp32"``, ``"bf16"``, on a CPU ``"int8"``, on a GPU ``"fp16"``.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:<index>"``.

        Raises:
            UserError: unknown dtype, no such device, or a weight is missing.
        """
        key = self._packed_as(dtype, device)
        if key not in self._encoders:
            self._encoders[key] = PackedEncoder(WeightReader(self.config, self.state, dtype, device=device))
        return self._encoders[key]

    def _packed_as(self, dtype: str, device: str) -> tuple[str, str | None, str]:
        if dtype not in DTYPES:
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if device != "cpu" and not torch.cuda.is_available():
            raise UserError(f"device {device}: PyTorch finds no GPU")
        wrong = "fp16" if device == "cpu" else "int8"
        if dtype == wrong:
            raise UserError(f"--dtype {dtype} is not for {'a CPU' if device == 'cpu' else 'a GPU'}")
        return dtype, forced_backend(), device

    def encode(self, texts: str | Iterable[str], **options: Any) -> np.ndarray:
        """Embeds texts.

        Args:
            texts: one text, or any number of them.
            **options: as for :meth:`encode_iter`.

        Returns:
            fp32 ``[texts, hidden]`` in the order of the texts, for one text ``[hidden]``.

        Raises:
            UserError: as :meth:`encode_iter`.
        """
        if isinstance(texts, str):
            return self.encode([texts], **options)[0]
        blocks = list(self.encode_blocks(texts, **options))
        return np.concatenate(blocks) if blocks else np.zeros((0, self.config.hidden_size), np.float32)

    def encode_iter(self, texts: Iterable[str], **options: Any) -> Iterator[np.ndarray]:
        """Embeds a stream of texts of any length in constant memory: yields fp32 ``[hidden]`` for each, in order.

        Args:
            texts: the texts; read a few batches ahead of what is yielded.
            **options: as for :meth:`encode_blocks`.

        Raises:
            UserError: as :meth:`encode_blocks`.
        """
        for block in self.encode_blocks(texts, **options):
            yield from block

    def encode_blocks(
        self,
        texts: Iterable[str],
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        max_seq_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        dtype: str = "fp32",
        device: str | None = None,
        num_proc: int = 1,
    ) -> Iterator[np.ndarray]:
        """Embeds a stream of texts and yields fp32 ``[at most batch_size, hidden]``, in order.

        Args:
            texts: the texts; read a few batches ahead of what is yielded.
            pooling: ``"mean"``, ``"cls"`` or ``"max"`` over the tokens of a text, special tokens included.
            normalize: whether each vector is divided by its Euclidean norm.
            max_seq_length: tokens of a text, special tokens included; longer ones are cut.
            prompt: what comes before each text.
            prompt_name: of one of the checkpoint's prompts, in place of ``prompt``.
            batch_size: texts computed together; changes nothing but the speed, on a GPU the last bits.
            dtype: ``"fp32"``, ``"bf16"``, on a CPU ``"int8"`` or on a GPU ``"fp16"`` weights of the linear layers.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:<index>"``; by default the current GPU where there is one.
            num_proc: processes that tokenise; with 1 it is a thread of this process.

        The first five are by default what the checkpoint records in the files of sentence-transformers, else the
        mean, normalised, of as many tokens as the model has positions, without a prompt.

        Raises:
            UserError: an option is out of range, a text is no string, the model has no tokenizer, there is no prompt
                of that name, or its files ask for a module or a pooling that is not supported.
        """
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer: give --tokenizer_name")
        given = {"pooling": pooling, "normalize": normalize, "max_seq_length": max_seq_length}
        settings = replace(self._embedding(), **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
        settings = settings.checked(self.config.max_position_embeddings)
        encoder = self.encoder(dtype, device or _default_device())
        embedder = Embedder(encoder, self.tokenizer, settings, settings.prompt(prompt, prompt_name))
        yield from embedder.blocks(texts, batch_size, num_proc)

    @overload
    def generate(
        self, inputs: str, *, dtype: str = ..., device: str | None = ..., **options: Any
    ) -> GenerationResult: ...

    @overload
    def generate(
        self, inputs: Iterable[Source], *, dtype: str = ..., device: str | None = ..., **options: Any
    ) -> list[GenerationResult]: ...

    def generate(
        self, inputs: str | Iterable[Source], *, dtype: str = "fp32", device: str | None = None, **options: Any
    ) -> Any:
        """Decodes sources; results in input order, of one text the result alone.

        Arguments and errors as for :meth:`generate_stream`.
        """
        if isinstance(inputs, str):
            return self.generate([inputs], dtype=dtype, device=device, **options)[0]
        found = dict(self.generate_stream(inputs, dtype=dtype, device=device, **options))
        return [found[i] for i in range(len(found))]

    def generate_stream(
        self, inputs: Iterable[Source], *, dtype: str = "fp32", device: str | None = None, **options: Any
    ) -> Iterator[tuple[int, GenerationResult]]:
        """Decodes sources and yields ``(index, result)`` as each finishes.

        Args:
            inputs: texts, or lists of tokens (tokens unknown to the vocabulary are read as ``[UNK]``).
            dtype: ``"fp32"``, ``"bf16"``, on a CPU ``"int8"`` or on a GPU ``"fp16"`` weights of the linear layers.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:<index>"``; by default the current GPU where there is one.
            **options: fields of :class:`~minilm_fast.decoding.options.SearchOptions`.

        Raises:
            UserError: an option is out of range, a source is of another kind, the model has no tokenizer or no
                prediction head, or source and target together are longer than its table of positions.
        """
        search_options = SearchOptions(**options)
        tokenizer = self._checked_tokenizer(search_options)
        prepared = [PreparedSource(tokenizer, source, search_options) for source in _checked_sources(inputs)]
        self._check_positions(prepared, search_options)
        special = SpecialIds(tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id)
        search = BeamSearch(
            self.engine(dtype, device or _default_device()),
            search_options,
            special,
            ignored_ids(tokenizer, search_options.forbid_ignore_word),
        )
        for index, hypothesis in search.run([p.ids for p in prepared]):
            yield index, _result(tokenizer, prepared[index], hypothesis)

    def _checked_tokenizer(self, options: SearchOptions) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer: give --tokenizer_name")
        if options.beam_size > self.config.vocab_size:
            raise UserError(
                f"--beam_size {options.beam_size} is larger than the vocabulary of {self.config.vocab_size} tokens"
            )
        return self.tokenizer

    def _check_positions(self, prepared: Sequence[PreparedSource], options: SearchOptions) -> None:
        longest = max((len(p.ids) for p in prepared), default=0)
        needed, table = longest + options.max_tgt_length, self.config.max_position_embeddings
        if needed > table:
            raise UserError(
                f"a source of {longest} tokens and --max_tgt_length {options.max_tgt_length} need {needed} positions, "
                f"the model has {table}: lower --max_seq_length"
            )


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _embedding_settings(name_or_path: str | Path, folder: Path, cache_dir: str | None) -> EmbeddingSettings:
    if not Path(name_or_path).exists():
        hub.fetch_optional(name_or_path, SETTINGS_FILES, revision=folder.name, cache_dir=cache_dir)
    return read_settings(folder)


def _checked_sources(inputs: Iterable[Source]) -> Iterator[Source]:
    if isinstance(inputs, str):
        raise UserError("inputs must be sources, got one string")
    for number, source in enumerate(inputs):
        tokens = not isinstance(source, str) and isinstance(source, Sequence)
        if not isinstance(source, str) and not (tokens and all(isinstance(token, str) for token in source)):
            raise UserError(f"source {number} must be a string or a list of tokens, got {source!r:.60}")
        yield source


class PreparedSource:
    """A source as the model reads it."""

    def __init__(self, tokenizer: Tokenizer, source: Source, options: SearchOptions) -> None:
        tokens = tokenizer.tokenize(source) if isinstance(source, str) else list(source)
        limit = options.max_source_length
        body = tokenizer.convert_tokens_to_ids(tokens[:limit])
        self.truncated = max(0, len(tokens) - limit)
        self.unknown = body.count(tokenizer.unk_id)
        self.ids = [tokenizer.cls_id, *body] if options.pos_shift else [tokenizer.cls_id, *body, tokenizer.sep_id]


def ignored_ids(tokenizer: Tokenizer, words: str | None) -> list[int]:
    """Ids of the words that n-gram blocking overlooks.

    Args:
        words: separated by ``|``; one in brackets is upper-cased (``[x_sep]``); each is one entry of the vocabulary,
            an unknown one stands for ``[UNK]``, as in the original.
    """
    if words is None:
        return []
    split = [w.upper() if w.startswith("[") and w.endswith("]") else w for w in words.split("|")]
    return sorted(set(tokenizer.convert_tokens_to_ids(split)))


def _result(tokenizer: Tokenizer, prepared: PreparedSource, hypothesis: Hypothesis) -> GenerationResult:
    end = {tokenizer.sep_id, tokenizer.pad_id}
    body = next((hypothesis.ids[:i] for i, token in enumerate(hypothesis.ids) if token in end), hypothesis.ids)
    tokens = tokenizer.convert_ids_to_tokens(body)
    return GenerationResult(
        text=tokenizer.detokenize(tokens),
        tokens=tokens,
        ids=hypothesis.ids,
        score=hypothesis.score,
        source_length=len(prepared.ids),
        truncated=prepared.truncated,
        unknown=prepared.unknown,
        trace=hypothesis.trace,
    )
