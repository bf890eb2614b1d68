"""Write an encoder with its head as an ONNX file: ``python -m minilm_fast.export_onnx``."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm_fast.cli import ArgumentParser, guarded, leave, say
from minilm_fast.errors import UserError

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

    from minilm_fast.checkpoint import LoadedCheckpoint
    from minilm_fast.modeling.onnx_graph import Graph, GraphBuilder

TASKS = (
    "embeddings",
    "hidden-states",
    "sequence-classification",
    "question-answering",
    "token-classification",
    "masked-lm",
)
POOLINGS = ("mean", "cls")
SINGLE_FILE_LIMIT = 1_900_000_000
"""Bytes of weights that one file holds; protobuf ends at 2 GiB."""
SMALL = 1024
"""Bytes of a tensor that stays in the model's own file in any case."""


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="minilm_fast.export_onnx",
        description="Write an encoder of the BERT family with its head as an ONNX file of standard operators, with "
        "dynamic batch and length.",
    )
    parser.add_argument("--model_path", required=True, help="folder, weights file or hub id of the checkpoint")
    parser.add_argument("--config_name", help="configuration, if it is not beside the weights")
    parser.add_argument("--model_type", help="family, where neither names nor configuration tell")
    parser.add_argument("--cache_dir", help="where downloads from the hub are kept")
    parser.add_argument("--output_file", required=True, help="ONNX file to write")
    parser.add_argument("--task", default="embeddings", choices=TASKS, help="what the model puts out")
    parser.add_argument("--pooling", default="mean", choices=POOLINGS, help="of the tokens, for embeddings")
    parser.add_argument("--normalize", action="store_true", help="embeddings of length 1")
    return parser


def export_onnx(
    model_path: str | os.PathLike[str],
    output_file: str | os.PathLike[str],
    *,
    task: str = "embeddings",
    pooling: str = "mean",
    normalize: bool = False,
    config_name: str | None = None,
    model_type: str | None = None,
    cache_dir: str | None = None,
) -> list[Path]:
    """Writes a checkpoint as an ONNX model over padded batches.

    Inputs are ``input_ids``, ``attention_mask`` and, where the model has token types, ``token_type_ids``, all int64
    ``[batch, sequence]``, padded on the right. Outputs are fp32: ``sentence_embedding [batch, hidden]``;
    ``last_hidden_state [batch, sequence, hidden]``; ``logits`` of the sequence, of the tokens or over the vocabulary;
    ``start_logits`` and ``end_logits [batch, sequence]``.

    Args:
        model_path: a folder, a hub id, or a weights file.
        output_file: where to; the file appears whole or not at all. Weights beyond what one file can hold go to
            ``OUTPUT_FILE.data`` beside it.
        task: one of ``TASKS``.
        pooling: ``"mean"`` of the tokens or the vector of the first (``"cls"``), for embeddings.
        normalize: scale embeddings to length 1.
        config_name, model_type, cache_dir: as for :meth:`minilm_fast.Model.from_pretrained`.

    Returns:
        The files written.

    Raises:
        UserError: the checkpoint is damaged or lacks the head that the task needs, the file cannot be written, or the
            package ``onnx`` is not installed.
    """
    _check(output_file, task, pooling, normalize)
    from minilm_fast import checkpoint
    from minilm_fast.modeling.onnx_graph import GraphBuilder

    found = checkpoint.resolve(model_path, config_name=config_name, cache_dir=cache_dir)
    loaded = checkpoint.load(found.weights, config=found.config, model_type=model_type, fold_token_types=True)
    if loaded.config.extra.get("is_decoder"):
        raise UserError(f"{loaded.path}: the configuration says is_decoder; only bidirectional models are exported")
    build = GraphBuilder(loaded.config, {**loaded.extra_state, **loaded.state})
    try:
        _add_task(build, task, pooling, normalize)
    except UserError as error:
        raise UserError(f"{loaded.path}: --task {task}: {error}") from None
    return _write(Path(output_file), build, _metadata(loaded, task, pooling, normalize))


def _check(output_file: str | os.PathLike[str], task: str, pooling: str, normalize: bool) -> None:
    if task not in TASKS:
        raise UserError(f"--task must be one of {', '.join(TASKS)}, got {task!r}")
    if pooling not in POOLINGS:
        raise UserError(f"--pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if task != "embeddings" and (normalize or pooling != "mean"):
        raise UserError(f"--pooling and --normalize are for --task embeddings, not {task}")
    target = Path(output_file)
    if target.is_dir():
        raise UserError(f"--output_file {target}: is a folder")
    if not target.parent.is_dir():
        raise UserError(f"--output_file {target}: there is no folder {target.parent}")
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise UserError("the package onnx is needed: pip install 'minilm_fast[onnx]'") from None


def _add_task(build: GraphBuilder, task: str, pooling: str, normalize: bool) -> None:
    from minilm_fast.modeling import onnx_graph

    if task == "embeddings":
        onnx_graph.embeddings(build, pooling, normalize)
    else:
        getattr(onnx_graph, task.replace("-", "_"))(build)


def _metadata(loaded: LoadedCheckpoint, task: str, pooling: str, normalize: bool) -> dict[str, str]:
    """What the file says of itself."""
    config = loaded.config
    values = {"task": task, "model_type": config.model_type, "max_length": str(config.max_position_embeddings)}
    if task == "embeddings":
        values |= {"pooling": pooling, "normalize": str(normalize).lower()}
    labels = config.extra.get("id2label")
    if task.endswith("classification") and isinstance(labels, dict):
        values["id2label"] = json.dumps(labels)
    return values


def _write(target: Path, build: GraphBuilder, metadata: dict[str, str]) -> list[Path]:
    """Builds the file's message, checks it and writes it; the weights first where they are a file of their own."""
    import onnx

    from minilm_fast.atomic import atomic_write, remove_quietly

    graph = build.graph
    outside = sum(array.nbytes for array in graph.weights.values()) > SINGLE_FILE_LIMIT
    data = target.with_name(f"{target.name}.data")
    model = _message(build, metadata)
    if not outside:
        model.graph.initializer.extend(_inside(name, graph) for name in graph.weights)
        onnx.checker.check_model(model, full_check=True)
        with atomic_write(target) as stream:
            stream.write(model.SerializeToString())
        # What an earlier, larger model left.
        remove_quietly(data)
        return [target]
    # A model whose weights were exchanged under it would be wrong; there is none until the new one is whole.
    remove_quietly(target)
    offset = 0
    with atomic_write(data) as stream:
        for name, array in graph.weights.items():
            if array.nbytes < SMALL:
                model.graph.initializer.append(_inside(name, graph))
                continue
            model.graph.initializer.append(_outside(name, graph, data.name, offset))
            offset += stream.write(array.tobytes())
    with atomic_write(target) as stream:
        stream.write(model.SerializeToString())
    onnx.checker.check_model(str(target))
    return [target, data]


def _message(build: GraphBuilder, metadata: dict[str, str]) -> ModelProto:
    from onnx import TensorProto, helper

    from minilm_fast import __version__
    from minilm_fast.modeling.onnx_graph import BATCH, IR_VERSION, LENGTH, OPSET

    graph = build.graph
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, [BATCH, LENGTH]) for n in build.inputs()]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in graph.outputs.items()]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "minilm_fast", inputs, outputs),
        producer_name="minilm_fast",
        producer_version=__version__,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, metadata)
    return model


def _inside(name: str, graph: Graph) -> TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(graph.weights[name], name)


def _outside(name: str, graph: Graph, file: str, offset: int) -> TensorProto:
    """A weight that lies in ``file`` from ``offset`` on."""
    from onnx import TensorProto, helper

    array = graph.weights[name]
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    where: dict[str, Any] = {"location": file, "offset": offset, "length": array.nbytes}
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def run(args: Namespace) -> None:
    """Exports and names the files written.

    Raises:
        UserError: see :func:`export_onnx`.
    """
    files = export_onnx(**vars(args))
    say("written", ", ".join(str(file) for file in files))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: run(args))


if __name__ == "__main__":
    leave(main())
