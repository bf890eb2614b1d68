"""Fast distillation, fine-tuning and decoding of MiniLM, UniLM and other BERT-family Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minilm_fast._version import __version__

if TYPE_CHECKING:
    from minilm_fast.config import Config
    from minilm_fast.modeling.model import Model
    from minilm_fast.ops import backend
    from minilm_fast.tokenization import Tokenizer

__all__ = ["Config", "Model", "Tokenizer", "__version__", "backend"]

_HOMES = {
    "Config": "minilm_fast.config",
    "Model": "minilm_fast.modeling.model",
    "Tokenizer": "minilm_fast.tokenization",
    "backend": "minilm_fast.ops",
}


def __getattr__(name: str) -> Any:
    """Loads what is asked for, so that importing the package (as ``--help`` does) costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'minilm_fast' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
