"""Heads on the encoder, with the names, shapes and results of transformers' classes."""

from minilm_fast.modeling.heads.base import HeadModel
from minilm_fast.modeling.heads.inputs import HeadInput
from minilm_fast.modeling.heads.masked_lm import CausalLM, MaskedLM
from minilm_fast.modeling.heads.multiple_choice import MultipleChoice
from minilm_fast.modeling.heads.pretraining import (
    NextSentencePredictor,
    PreTraining,
    PreTrainingLogits,
    ReplacedTokenDetector,
)
from minilm_fast.modeling.heads.token_classification import TokenClassifier

__all__ = [
    "CausalLM",
    "HeadInput",
    "HeadModel",
    "MaskedLM",
    "MultipleChoice",
    "NextSentencePredictor",
    "PreTraining",
    "PreTrainingLogits",
    "ReplacedTokenDetector",
    "TokenClassifier",
]
