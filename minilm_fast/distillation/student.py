"""The student network: its configuration, and what its weights start from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from minilm_fast import ops
from minilm_fast.config import Config
from minilm_fast.errors import UserError
from minilm_fast.layouts import DECODER_WEIGHT, POSITION_EMBEDDINGS, WORD_EMBEDDINGS
from minilm_fast.modeling.encoder import Encoder, initialise
from minilm_fast.modeling.seq2seq import Head

_ENCODER_LAYER = "bert.encoder.layer."
# What a teacher's configuration says of another task or of the file that it came from.
_FOREIGN_KEYS = (
    "architectures",
    "classifier_dropout",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "label2id",
    "minilm_fast",
    "num_labels",
    "problem_type",
    "_num_labels",
)


class Student(nn.Module):
    """An encoder, and a masked-language-model head if one is trained along.

    Parameters start as BERT's do: normal with ``config.initializer_range``, biases 0, LayerNorms 1.
    """

    def __init__(self, config: Config, *, with_head: bool = False) -> None:
        super().__init__()
        self.config = config
        self.bert = Encoder(config)
        self.cls = Head(config) if with_head else None
        initialise(self, config.initializer_range)

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Weights under canonical names."""
        state = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        if self.cls is not None:
            state.setdefault(DECODER_WEIGHT, state[WORD_EMBEDDINGS])
        return state

    def load_checkpoint_state(self, state: Mapping[str, Tensor], where: str) -> None:
        """Take the weights of a checkpoint; a head that it lacks stays as it is.

        Raises:
            UserError: one is missing or has another shape.
        """
        own = self.state_dict()
        given = {name: tensor for name, tensor in state.items() if name in own}
        for name, tensor in own.items():
            if name not in given and not name.startswith("cls."):
                raise UserError(f"{where}: {name} is missing")
            if name in given and given[name].shape != tensor.shape:
                raise UserError(
                    f"{where}: {name} has shape {list(given[name].shape)}, the student {list(tensor.shape)}"
                )
        self.load_state_dict(given, strict=False)

    def predictions_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the words ``labels [rows]`` at ``hidden [rows, hidden_size]``, fp32; 0 without rows."""
        assert self.cls is not None
        head = self.cls.predictions
        matrix = head.matrix(self.bert.embeddings.word_embeddings.weight)
        losses = ops.label_smoothed_cross_entropy(head.transform(hidden), matrix, head.bias, labels, 0.0)
        return losses.sum() / max(1, len(labels))


def student_config(
    teacher: Config,
    *,
    layers: int | None = None,
    hidden_size: int | None = None,
    heads: int | None = None,
    intermediate_size: int | None = None,
) -> Config:
    """A configuration of the teacher's family with other sizes.

    Args:
        layers, heads: by default the teacher's.
        hidden_size: by default the teacher's.
        intermediate_size: by default 4 times the hidden size, or the teacher's if the hidden size is the same.

    Raises:
        UserError: the sizes do not fit one another.
    """
    width = hidden_size or teacher.hidden_size
    same = width == teacher.hidden_size
    # The students of the papers are plain BERTs; relative positions and their family's name stay behind.
    return teacher.replace(
        model_type="minilm" if teacher.model_type == "unilm" else teacher.model_type,
        num_hidden_layers=layers or teacher.num_hidden_layers,
        hidden_size=width,
        embedding_size=0,
        num_attention_heads=heads or teacher.num_attention_heads,
        intermediate_size=intermediate_size or (teacher.intermediate_size if same else 4 * width),
        rel_pos_bins=0,
        max_rel_pos=0,
        label_smoothing=0.0,
        fix_word_embedding=False,
        tie_word_embeddings=True,
        extra={key: value for key, value in copy.deepcopy(dict(teacher.extra)).items() if key not in _FOREIGN_KEYS},
    )


def copy_layers(student: Student, config: Config, state: Mapping[str, Tensor], layers: Sequence[int]) -> None:
    """Start from layers of the teacher, and from its embeddings.

    Args:
        config, state: the teacher's.
        layers: the teacher's layer, from 0, for each of the student's.

    Raises:
        UserError: there is no such layer, their number is not the student's, or sizes differ.
    """
    own = student.config
    if len(layers) != own.num_hidden_layers:
        raise UserError(f"--init_from_layers names {len(layers)} layers, the student has {own.num_hidden_layers}")
    wrong = next((layer for layer in layers if not 0 <= layer < config.num_hidden_layers), None)
    if wrong is not None:
        raise UserError(f"--init_from_layers {wrong}: the teacher's layers are 0 to {config.num_hidden_layers - 1}")
    for name in ("hidden_size", "embedding_size", "intermediate_size", "num_attention_heads"):
        if getattr(own, name) != getattr(config, name):
            raise UserError(
                f"--init_from_layers needs the teacher's {name} of {getattr(config, name)}, the student has "
                f"{getattr(own, name)}"
            )
    renamed = {name: tensor for name, tensor in state.items() if not name.startswith(_ENCODER_LAYER)}
    for number, layer in enumerate(layers):
        prefix = f"{_ENCODER_LAYER}{layer}."
        for name, tensor in state.items():
            if name.startswith(prefix):
                renamed[f"{_ENCODER_LAYER}{number}.{name.removeprefix(prefix)}"] = tensor
    renamed[POSITION_EMBEDDINGS] = renamed[POSITION_EMBEDDINGS][: own.max_position_embeddings]
    student.load_checkpoint_state(renamed, "teacher")


def freeze_untrained(student: Student, layer: int, names: Sequence[str]) -> None:
    """Take from training what distillation gives no gradient: all behind the vectors of ``layer`` (from 1).

    Args:
        names: the modules that project to the vectors in use (``"query"``, ...).
    """
    used = tuple(f"{_ENCODER_LAYER}{layer - 1}.attention.self.{name}." for name in names)
    for name, param in student.named_parameters():
        if name.startswith(_ENCODER_LAYER):
            number = int(name.removeprefix(_ENCODER_LAYER).partition(".")[0])
            param.requires_grad_(number < layer - 1 or name.startswith(used))


def parameter_count(config: Config) -> int:
    """Parameters of the encoder."""
    with torch.device("meta"):
        return sum(param.numel() for param in Encoder(config).parameters())
