"""Deep self-attention distillation, MiniLM v1 and v2."""

from minilm_fast.distillation.distiller import DistillationLoss, Distiller
from minilm_fast.distillation.relations import Relation, parse_relations
from minilm_fast.distillation.teacher import FrozenEncoder

__all__ = ["DistillationLoss", "Distiller", "FrozenEncoder", "Relation", "parse_relations"]
