"""The systems that the decoding benchmark compares, one file each."""

from __future__ import annotations

import importlib

from peers.base import DecodeJob, Peer

PEERS = {
    "minilm_fast": "peers.ours:MinilmFast",
    "hf": "peers.huggingface:HuggingFace",
    "ctranslate2": "peers.ctranslate:CTranslate2",
    "original": "peers.original:Original",
}


def create(name: str, job: DecodeJob) -> Peer:
    """The peer of that name, its modules imported but nothing built yet."""
    module, _, attribute = PEERS[name].partition(":")
    peer: Peer = getattr(importlib.import_module(module), attribute)(job)
    return peer
