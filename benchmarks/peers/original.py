"""The original decoder, run from the user's own checkout of microsoft/unilm's ``s2s-ft``."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

from vocabulary import SPECIALS

from peers.base import DecodeJob, NotSupported, Peer

SPECIAL_TOKENS = 2


class Original(Peer):
    """``BertForSeq2SeqDecoder`` of ``s2s_ft/modeling_decoding.py``, its code unchanged.

    Two things stand between that file and a CPU with today's libraries, and are supplied from outside: the name
    ``transformers.file_utils.cached_path``, which it imports and decoding never calls, and ``Tensor.cuda``, which
    n-gram blocking calls and which here returns the tensor as it is.
    """

    name = "original"
    dtypes = ("fp32",)

    def __init__(self, job: DecodeJob) -> None:
        super().__init__(job)
        if job.original is None:
            raise NotSupported("the original is measured only with --original PATH, a checkout of s2s-ft")

    def version(self) -> str:
        import torch

        return f"microsoft/unilm s2s-ft, torch {torch.__version__}"

    def settings(self) -> str:
        return f"code unchanged, Tensor.cuda() a no-op, inference_mode, {self.job.threads} threads"

    def build(self) -> None:
        import torch

        torch.set_num_threads(self.job.threads)
        torch.manual_seed(self.job.seed)
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]
        self.module = self._import()
        shape = self.job.shape
        self.config = self.module.BertConfig(
            shape.vocab,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.intermediate,
            max_position_embeddings=shape.positions,
        )
        self.model = self._model()
        cls, sep = SPECIALS.index("[CLS]"), SPECIALS.index("[SEP]")
        self.input_ids = torch.tensor([[cls, *source, sep] for source in self.job.sources(SPECIAL_TOKENS)])

    def _import(self) -> Any:
        assert self.job.original is not None
        path = self.job.original / "s2s_ft" / "modeling_decoding.py"
        if not path.is_file():
            raise NotSupported(f"--original {self.job.original}: there is no s2s_ft/modeling_decoding.py in it")
        package, stand_in = types.ModuleType("transformers"), types.ModuleType("transformers.file_utils")
        stand_in.cached_path = None  # type: ignore[attr-defined]
        sys.modules.update({"transformers": package, "transformers.file_utils": stand_in})
        spec = importlib.util.spec_from_file_location("original_modeling_decoding", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _model(self) -> Any:
        load = self.job.load
        return self.module.BertForSeq2SeqDecoder(
            self.config,
            mask_word_id=SPECIALS.index("[MASK]"),
            search_beam_size=load.beam,
            length_penalty=0,
            eos_id=SPECIALS.index("[SEP]"),
            sos_id=SPECIALS.index("[CLS]"),
            forbid_duplicate_ngrams=load.ngram > 0,
            forbid_ignore_set={SPECIALS.index(".")},
            ngram_size=load.ngram,
            min_len=load.steps,
        ).eval()

    def decode(self, steps: int) -> list[int]:
        import torch

        self.model.min_len = steps
        batch, source = self.input_ids.shape
        total = source + steps
        types_ = torch.tensor([0] * source + [1] * steps).expand(batch, total)
        positions = torch.arange(total).expand(batch, total)
        mask = torch.tril(torch.ones(total, total, dtype=torch.long))
        mask[:, :source] = 1
        mask[:source, source:] = 0
        with torch.inference_mode():
            traces = self.model(self.input_ids, types_, positions, mask.expand(batch, total, total))
        return [int((row != 0).sum()) for row in traces["pred_seq"]]
