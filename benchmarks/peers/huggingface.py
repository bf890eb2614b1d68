"""Hugging Face ``generate`` on the size-matched BART cousin."""

from __future__ import annotations

from typing import Any

from cousin import HUGGINGFACE_FOLDER

from peers.base import Peer


class HuggingFace(Peer):
    """Beam search of transformers with its default (dynamic) key/value cache and fused attention."""

    name = "hf"
    dtypes = ("fp32", "bf16")

    def version(self) -> str:
        import torch
        import transformers

        return f"transformers {transformers.__version__}, torch {torch.__version__}"

    def settings(self) -> str:
        return f"sdpa attention, dynamic cache, inference_mode, {self.job.threads} threads"

    def build(self) -> None:
        import torch
        from transformers import BartForConditionalGeneration

        torch.set_num_threads(self.job.threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.job.dtype]
        self.model: Any = BartForConditionalGeneration.from_pretrained(
            self.job.folder / HUGGINGFACE_FOLDER, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self.input_ids = torch.tensor(self.job.sources(specials=0))

    def decode(self, steps: int) -> list[int]:
        import torch

        with torch.inference_mode():
            output = self.model.generate(
                self.input_ids,
                attention_mask=torch.ones_like(self.input_ids),
                num_beams=self.job.load.beam,
                do_sample=False,
                no_repeat_ngram_size=self.job.load.ngram,
                min_new_tokens=steps,
                max_new_tokens=steps,
                use_cache=True,
            )
        # The first column is the decoder's start token.
        return [len(row) - 1 for row in output.tolist()]
