"""minilm_fast's packed encoder."""

from __future__ import annotations

from typing import Any

import numpy as np

from peers.encoder_base import Case, EncoderPeer


class MinilmFast(EncoderPeer):
    """Packed batches over weights that were packed once."""

    name = "minilm_fast"
    dtypes = ("fp32", "bf16", "int8")
    backend = "none"

    def version(self) -> str:
        import torch

        import minilm_fast

        return f"minilm_fast {minilm_fast.__version__}, torch {torch.__version__}"

    def settings(self) -> str:
        slow = " (the extension is not in use: slow)" if self.backend == "reference" else ""
        return f"packed batches, backend {self.backend}{slow}"

    def build(self) -> None:
        import torch

        from minilm_fast import checkpoint
        from minilm_fast.modeling.packed_encoder import PackedEncoder, WeightReader
        from minilm_fast.ops._dispatch import select

        torch.set_num_threads(self.job.threads)
        found = checkpoint.load(self.job.model)
        self.encoder = PackedEncoder(WeightReader(found.config, found.state, self.job.dtype))
        self.backend = select("attention", torch.empty(0))

    def ready(self, sequences: list[list[int]]) -> Any:
        from minilm_fast.data.token_batch import TokenBatch

        return TokenBatch.from_sequences(sequences)

    def encode(self, batch: Any, case: Case) -> np.ndarray:
        import torch

        from minilm_fast import ops

        with torch.no_grad():
            hidden = self.encoder.hidden_states(batch.input_ids, batch.position_ids, batch.layout)
            vectors: np.ndarray = ops.pool_sequences(hidden, batch.layout, "mean", normalize=True).numpy()
        return vectors
