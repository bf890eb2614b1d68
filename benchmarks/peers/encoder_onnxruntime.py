"""ONNX Runtime on the exported model."""

from __future__ import annotations

from typing import Any

import numpy as np

from peers.base import NotSupported
from peers.encoder_base import ONNX_FILE, ONNX_INT8_FILE, Case, EncoderJob, EncoderPeer, Padded


class OnnxRuntime(EncoderPeer):
    """The CPU provider with all graph optimisations; int8 is its dynamic quantisation."""

    name = "onnxruntime"
    dtypes = ("fp32", "int8")

    def version(self) -> str:
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"

    def settings(self) -> str:
        int8 = "model of its transformer optimiser, quantize_dynamic per channel, QInt8"
        return int8 if self.job.dtype == "int8" else "exported model, all graph optimisations"

    def build(self) -> None:
        import onnxruntime

        file = self.job.folder / (ONNX_INT8_FILE if self.job.dtype == "int8" else ONNX_FILE)
        if not file.is_file():
            raise NotSupported(f"{file.name} could not be made")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.job.threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def ready(self, sequences: list[list[int]]) -> Any:
        return Padded.from_sequences(sequences).feed()

    def encode(self, batch: Any, case: Case) -> np.ndarray:
        (embeddings,) = self.session.run(None, batch)
        return embeddings


def quantize(job: EncoderJob, heads: int, hidden: int) -> None:
    """Writes the int8 model: fused by ONNX Runtime's own optimiser, then quantised as its documentation recommends."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    fused = job.folder / "model-fused.onnx"
    model = optimizer.optimize_model(
        str(job.folder / ONNX_FILE), model_type="bert", num_heads=heads, hidden_size=hidden, opt_level=0
    )
    model.save_model_to_file(str(fused))
    quantize_dynamic(
        fused,
        job.folder / ONNX_INT8_FILE,
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
