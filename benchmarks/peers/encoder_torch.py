"""BertModel of transformers: eager attention, fused attention (SDPA), and torch.compile."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from peers.encoder_base import Case, EncoderPeer, Padded, once_per_shape


class TorchEager(EncoderPeer):
    """Attention as products and a softmax, the layers one operator after the other."""

    name = "torch eager"
    dtypes = ("fp32", "bf16")
    attention: ClassVar[str] = "eager"

    def version(self) -> str:
        import torch
        import transformers

        return f"transformers {transformers.__version__}, torch {torch.__version__}"

    def settings(self) -> str:
        return f"{self.attention} attention, inference_mode, weights in {self.job.dtype}"

    def build(self) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(self.job.threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.job.dtype]
        self.model: Any = transformers.BertModel.from_pretrained(
            self.job.model, dtype=dtype, attn_implementation=self.attention, add_pooling_layer=False
        ).eval()

    def ready(self, sequences: list[list[int]]) -> Any:
        import torch

        return {name: torch.from_numpy(value) for name, value in Padded.from_sequences(sequences).feed().items()}

    def forward(self, case: Case) -> Any:
        """The module that is called for a case."""
        return self.model

    def encode(self, batch: Any, case: Case) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.pooled(self.forward(case)(**batch).last_hidden_state, batch["attention_mask"])

    @staticmethod
    def pooled(hidden: Any, mask: Any) -> np.ndarray:
        """The mean of the real tokens, in fp32."""
        import torch

        weights = mask[..., None].float()
        mean = (hidden.float() * weights).sum(1) / weights.sum(1)
        normalized: np.ndarray = torch.nn.functional.normalize(mean).numpy()
        return normalized


class TorchSdpa(TorchEager):
    """Fused attention, what transformers chooses by itself."""

    name = "torch sdpa"
    attention = "sdpa"


class TorchCompile(TorchEager):
    """torch.compile with frozen weights, which lets it pack them for oneDNN.

    Cases of one shape are compiled for it, the others together with dynamic shapes.
    """

    name = "torch compile"
    attention = "sdpa"

    def settings(self) -> str:
        return "sdpa attention, inductor with freezing, static shapes where a case has one, else dynamic"

    def build(self) -> None:
        super().build()
        import torch
        import torch._inductor.config as inductor

        inductor.freezing = True
        torch.set_grad_enabled(False)
        self._compiled: dict[str, Any] = {}

    def forward(self, case: Case) -> Any:
        import torch

        def compiled(fixed: bool) -> Any:
            # A function of its own each time, so that no case sees what was compiled for another.
            def call(**batch: Any) -> Any:
                return self.model(**batch)

            return torch.compile(call, dynamic=not fixed)

        return once_per_shape(case, compiled, self._compiled)

    def encode(self, batch: Any, case: Case) -> np.ndarray:
        # Freezing works under no_grad, not in inference_mode.
        return self.pooled(self.forward(case)(**batch).last_hidden_state, batch["attention_mask"])
