"""Fast distillation, fine-tuning and decoding of MiniLM, UniLM and other BERT-family Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minilm_fast._version import __version__

if TYPE_CHECKING:
    from minilm_fast.config import Config
    from minilm_fast.modeling.classification import SequenceClassifier
    from minilm_fast.modeling.heads import (
        CausalLM,
        MaskedLM,
        MultipleChoice,
        NextSentencePredictor,
        PreTraining,
        ReplacedTokenDetector,
        TokenClassifier,
    )
    from minilm_fast.modeling.model import Model
    from minilm_fast.modeling.question_answering import QuestionAnswerer
    from minilm_fast.ops import backend
    from minilm_fast.tokenization import Tokenizer

__all__ = [
    "CausalLM",
    "Config",
    "MaskedLM",
    "Model",
    "MultipleChoice",
    "NextSentencePredictor",
    "PreTraining",
    "QuestionAnswerer",
    "ReplacedTokenDetector",
    "SequenceClassifier",
    "TokenClassifier",
    "Tokenizer",
    "__version__",
    "backend",
    "register_with_transformers",
]

_HOMES = {
    "CausalLM": "minilm_fast.modeling.heads",
    "Config": "minilm_fast.config",
    "MaskedLM": "minilm_fast.modeling.heads",
    "Model": "minilm_fast.modeling.model",
    "MultipleChoice": "minilm_fast.modeling.heads",
    "NextSentencePredictor": "minilm_fast.modeling.heads",
    "PreTraining": "minilm_fast.modeling.heads",
    "QuestionAnswerer": "minilm_fast.modeling.question_answering",
    "ReplacedTokenDetector": "minilm_fast.modeling.heads",
    "SequenceClassifier": "minilm_fast.modeling.classification",
    "TokenClassifier": "minilm_fast.modeling.heads",
    "Tokenizer": "minilm_fast.tokenization",
    "backend": "minilm_fast.ops",
}


def register_with_transformers() -> None:
    """Makes ``attn_implementation="minilm_fast"`` known to transformers, as importing its module does.

    Raises:
        UserError: transformers is older than version 5.
    """
    from minilm_fast.integrations.transformers import register

    register()


def __getattr__(name: str) -> Any:
    """Loads what is asked for, so that importing the package (as ``--help`` does) costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'minilm_fast' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
