"""Heads on the encoder, with the names, shapes and results of transformers' classes."""

from minilm_fast.modeling.heads.base import HeadModel
from minilm_fast.modeling.heads.inputs import HeadInput
from minilm_fast.modeling.heads.masked_lm import MaskedLM
from minilm_fast.modeling.heads.multiple_choice import MultipleChoice
from minilm_fast.modeling.heads.token_classification import TokenClassifier

__all__ = ["HeadInput", "HeadModel", "MaskedLM", "MultipleChoice", "TokenClassifier"]
