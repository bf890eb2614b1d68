"""The systems that the encoder benchmark compares."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from peers.encoder_base import Case, EncoderJob, EncoderPeer

OURS = "minilm_fast"
ENCODERS = {
    OURS: "peers.encoder_ours:MinilmFast",
    "torch eager": "peers.encoder_torch:TorchEager",
    "torch sdpa": "peers.encoder_torch:TorchSdpa",
    "torch compile": "peers.encoder_torch:TorchCompile",
    "onnxruntime": "peers.encoder_onnxruntime:OnnxRuntime",
    "ctranslate2": "peers.encoder_ctranslate2:CTranslate2",
    "openvino": "peers.encoder_openvino:OpenVino",
}


def offered(name: str) -> tuple[str, ...]:
    """The dtypes that a peer can be asked for."""
    dtypes: tuple[str, ...] = _class(name).dtypes
    return dtypes


def create(name: str, job: EncoderJob, cases: Sequence[Case]) -> EncoderPeer:
    """The peer of that name, its modules imported but nothing built yet."""
    peer: EncoderPeer = _class(name)(job, cases)
    return peer


def _class(name: str) -> Any:
    module, _, attribute = ENCODERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
