"""Deep self-attention distillation: the loss of a batch.

MiniLM (Wang et al., arXiv 2002.10957) and MiniLMv2 (Wang et al., arXiv 2012.15828).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilm_fast import ops
from minilm_fast.distillation.relations import Relation, check_relations, needed_vectors, parse_relations
from minilm_fast.distillation.sides import Inputs, Side, SideInputs, make_side
from minilm_fast.errors import UserError


@dataclass(frozen=True)
class DistillationLoss:
    """The loss of a batch.

    Attributes:
        loss: fp32 scalar with a gradient to the student: the weighted sum of the relations' losses.
        relations: each relation's own loss without its weight, detached, by name (``"qk"``, ``"vv"``, ...).
    """

    loss: Tensor
    relations: dict[str, Tensor]


class Distiller(nn.Module):
    """Computes how far a student's self-attention relations are from its teacher's.

    Both models run up to the distilled layer; of that layer only the queries, keys and values that are needed are
    computed. The teacher runs without gradients and without dropout, whatever mode the distiller is in. It is no
    submodule: parameters, state and training mode of the distiller are the student's.

    Args:
        teacher, student: each an :class:`~minilm_fast.modeling.encoder.Encoder` (or a network that has one as
            ``bert``), a :class:`~minilm_fast.distillation.teacher.FrozenEncoder`, or a model from ``transformers``
            with BERT's modules.
        relations: ``"v1"``, ``"v2"``, a text such as ``"qk:1,vv:0.5"``, or relations.
        relation_heads: the vectors of all heads are concatenated and split into so many; by default the number of
            attention heads, which teacher and student must then have in common.
        teacher_layer, student_layer: from 1; by default the last.
        reduction: as for :func:`minilm_fast.ops.relation_kl`.

    Raises:
        UserError: the two cannot be paired: a layer is out of range, a hidden size is no multiple of the relation
            heads, the numbers of heads or the vocabularies differ.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        relations: str | Sequence[Relation] = "v1",
        *,
        relation_heads: int | None = None,
        teacher_layer: int | None = None,
        student_layer: int | None = None,
        reduction: str = "batch_mean",
    ) -> None:
        super().__init__()
        self.relations = parse_relations(relations) if isinstance(relations, str) else check_relations(relations)
        self.names = needed_vectors(self.relations)
        self.student = student
        self._sides: tuple[Side, Side] = (make_side(teacher), make_side(student))
        self._teacher = (teacher,)
        self.teacher_layer = _layer("teacher", self._sides[0], teacher_layer)
        self.student_layer = _layer("student", self._sides[1], student_layer)
        self.relation_heads = _relation_heads(*self._sides, relation_heads)
        self.reduction = reduction
        if isinstance(teacher, nn.Module):
            teacher.eval()

    @property
    def teacher(self) -> Any:
        """The teacher as it was given."""
        return self._teacher[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        # A move to another device takes the teacher along, though it is no submodule.
        super()._apply(fn, recurse)
        if isinstance(self.teacher, nn.Module):
            self.teacher._apply(fn)
        return self

    @torch.no_grad()
    def teacher_vectors(self, inputs: Inputs | SideInputs) -> dict[str, Tensor]:
        """The teacher's vectors ``[tokens, hidden_size]`` by letter."""
        if isinstance(self.teacher, nn.Module) and self.teacher.training:
            self.teacher.eval()
        return self._sides[0].vectors(_side_inputs(inputs), self.teacher_layer, self.names)

    def student_vectors(self, inputs: Inputs | SideInputs) -> dict[str, Tensor]:
        """The student's vectors ``[tokens, hidden_size]`` by letter."""
        return self._sides[1].vectors(_side_inputs(inputs), self.student_layer, self.names)

    def compare(
        self, teacher: dict[str, Tensor], student: dict[str, Tensor], layout: ops.SequenceLayout
    ) -> DistillationLoss:
        """The loss, given the vectors of both sides."""
        split = [
            {name: vectors.unflatten(1, (self.relation_heads, -1)) for name, vectors in side.items()}
            for side in (teacher, student)
        ]
        losses = {
            relation.name: ops.relation_kl(
                split[0][relation.a],
                split[0][relation.b],
                split[1][relation.a],
                split[1][relation.b],
                layout,
                reduction=self.reduction,
            )
            for relation in self.relations
        }
        total = torch.stack([relation.weight * losses[relation.name] for relation in self.relations]).sum()
        return DistillationLoss(total, {name: loss.detach() for name, loss in losses.items()})

    def forward(self, inputs: Inputs) -> DistillationLoss:
        """The loss of a batch.

        Args:
            inputs: a :class:`~minilm_fast.data.token_batch.TokenBatch`, or a mapping with ``input_ids``,
                ``attention_mask`` and maybe ``token_type_ids`` as a Hugging Face tokenizer gives them (padded on the
                right). The mask of a packed batch that is not bidirectional holds for the relations too.

        Raises:
            ValueError: the inputs do not fit the models' kind.
        """
        shared = SideInputs(inputs)
        return self.compare(self.teacher_vectors(shared), self.student_vectors(shared), shared.layout)


def _side_inputs(inputs: Inputs | SideInputs) -> SideInputs:
    return inputs if isinstance(inputs, SideInputs) else SideInputs(inputs)


def _layer(name: str, side: Side, given: int | None) -> int:
    layer = side.layers if given is None else given
    if not 1 <= layer <= side.layers:
        raise UserError(f"{name} layer {layer}: the {name} has layers 1 to {side.layers}")
    return layer


def _relation_heads(teacher: Side, student: Side, given: int | None) -> int:
    if teacher.vocab_size != student.vocab_size:
        raise UserError(
            f"the vocabularies differ: the teacher has {teacher.vocab_size} entries, the student {student.vocab_size}"
        )
    if given is None and teacher.heads != student.heads:
        raise UserError(
            f"the teacher has {teacher.heads} attention heads, the student {student.heads}: say into how many "
            f"relation heads both are to be split"
        )
    heads = teacher.heads if given is None else given
    for name, side in (("teacher", teacher), ("student", student)):
        if heads < 1 or side.hidden_size % heads:
            raise UserError(f"{heads} relation heads do not divide the {name}'s hidden size of {side.hidden_size}")
    return heads
