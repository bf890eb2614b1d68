"""OpenVINO on the exported model, and on what NNCF makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minilm_fast.config import Config
from peers.base import NotSupported
from peers.encoder_base import (
    ONNX_FILE,
    OPENVINO_INT8_FILE,
    Case,
    EncoderJob,
    EncoderPeer,
    Padded,
    once_per_shape,
)


class OpenVino(EncoderPeer):
    """One stream with all threads. Cases of one shape get a model reshaped to it, the others one with dynamic shapes.

    int8 is NNCF's post-training quantisation for Transformers; what it leaves in floating point runs in bf16 where the
    CPU has it, which is OpenVINO's own default there. With that mixture OpenVINO 2026.4 computes wrong attention where
    a batch is exactly as long as a head is wide (cosines of 0.69 to 0.91 to fp32; with one column of padding more they
    are above 0.99): such batches get that column.
    """

    name = "openvino"
    dtypes = ("fp32", "bf16", "int8")

    def version(self) -> str:
        import openvino

        return f"openvino {openvino.__version__.split('-')[0]}"

    def settings(self) -> str:
        quantised = (
            "NNCF post-training quantisation (model type TRANSFORMER), rest in " if self.job.dtype == "int8" else ""
        )
        wider = ", batches as long as a head is wide padded by one more" if self.job.dtype == "int8" else ""
        return f"{quantised}{self._precision()}, one stream, latency hint, static shapes where a case has one{wider}"

    def _precision(self) -> str:
        if self.job.dtype == "fp32":
            return "f32"
        return "bf16" if "BF16" in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"

    def build(self) -> None:
        import openvino

        self._head_size = Config.from_file(self.job.model).head_size
        self.core = openvino.Core()
        if self.job.dtype == "bf16" and self._precision() != "bf16":
            raise NotSupported(f"{self.version()} has no bf16 on this CPU")
        file = self.job.folder / (OPENVINO_INT8_FILE if self.job.dtype == "int8" else ONNX_FILE)
        if not file.is_file():
            raise NotSupported(f"{file.name} could not be made")
        self.model = self.core.read_model(file)
        self._requests: dict[str, Any] = {}

    def _request(self, case: Case, batch: dict[str, np.ndarray]) -> Any:
        settings = {
            "INFERENCE_NUM_THREADS": self.job.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self._precision(),
        }

        def compiled(fixed: bool) -> Any:
            model = self.model.clone()
            if fixed:
                model.reshape({entry.any_name: list(batch[entry.any_name].shape) for entry in model.inputs})
            return self.core.compile_model(model, "CPU", settings).create_infer_request()

        return once_per_shape(case, compiled, self._requests)

    def ready(self, sequences: list[list[int]]) -> Any:
        batch = Padded.from_sequences(sequences)
        if self.job.dtype == "int8" and batch.input_ids.shape[1] == self._head_size:
            batch = batch.wider()
        return batch.feed()

    def encode(self, batch: Any, case: Case) -> np.ndarray:
        embeddings: np.ndarray = self._request(case, batch).infer(batch)[0]
        return embeddings


def quantize(job: EncoderJob, calibration: Sequence[Sequence[int]]) -> None:
    """Writes the int8 model, calibrated on real sequences, one at a time."""
    import nncf
    import openvino

    feeds = [Padded.from_sequences([sequence]).feed() for sequence in calibration]
    model = openvino.Core().read_model(job.folder / ONNX_FILE)
    quantised = nncf.quantize(model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds))
    openvino.save_model(quantised, job.folder / OPENVINO_INT8_FILE, compress_to_fp16=False)
