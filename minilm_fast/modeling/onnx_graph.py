"""An encoder of the BERT family and its heads as an ONNX graph over padded batches.

The graph is put together from standard operators with the ``onnx`` package: nothing is traced, so it does not depend on
the release of PyTorch and holds no operator of this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from minilm_fast.config import ROBERTA_TYPES, Config
from minilm_fast.errors import UserError
from minilm_fast.modeling.encoder import lm_head_activation, relative_position_bucket

if TYPE_CHECKING:
    from onnx import NodeProto

OPSET = 17
"""The first with ``LayerNormalization``; every current runtime reads it."""
IR_VERSION = 8
MASKED = -65504.0
"""Added to the scores of padding: the lowest fp16, so that a conversion to fp16 stays finite."""
POOLINGS = ("mean", "cls")
BATCH, LENGTH = "batch", "sequence"
Axis = str | int


@dataclass
class Graph:
    """Nodes, weights by name, and shapes of the outputs by name, in the order in which they were made."""

    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    _scope: str = ""

    def scoped(self, scope: str) -> Graph:
        """The same graph; what is added through it is named below ``scope``."""
        return Graph(self.nodes, self.weights, self.outputs, scope)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output; the output's name."""
        from onnx import helper

        output = f"{self._scope}/{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def weight(self, name: str, value: np.ndarray) -> str:
        """Adds a weight, unless one of that name is there."""
        self.weights.setdefault(name, np.asarray(value, order="C"))
        return name

    def constant(self, value: float | int | Sequence[int]) -> str:
        """A number (fp32), a whole number or a list of whole numbers (int64)."""
        array = np.array(value, dtype=np.float32 if isinstance(value, float) else np.int64)
        return self.weight(f"constant_{array.dtype}_{array.tolist()}".replace(" ", ""), array)

    def output(self, name: str, source: str, shape: tuple[Axis, ...]) -> None:
        """Makes a tensor an output of the model under a name of its own."""
        from onnx import helper

        self.nodes.append(helper.make_node("Identity", [source], [name], name=name))
        self.outputs[name] = shape


class GraphBuilder:
    """Turns weights under canonical names into a graph.

    Args:
        config: of the checkpoint.
        state: the encoder's weights and those of the head, fp32; heads carry Hugging Face's names.
    """

    def __init__(self, config: Config, state: Mapping[str, Tensor]) -> None:
        self.config = config
        self._state = state
        self.graph = Graph()

    def inputs(self) -> list[str]:
        """Names of the inputs, all int64 ``[batch, sequence]``; padding is on the right, its mask 0."""
        return ["input_ids", "attention_mask", *(["token_type_ids"] if self.config.type_vocab_size else [])]

    def encoder(self) -> str:
        """The encoder; its last hidden states fp32 ``[batch, sequence, hidden]``."""
        graph = self.graph.scoped("embeddings")
        positions = self._positions(graph)
        hidden = self._embeddings(graph, positions)
        mask = self._mask(self.graph.scoped("mask"))
        bias = self._relative_bias(self.graph.scoped("relative_bias"), positions)
        for layer in range(self.config.num_hidden_layers):
            hidden = self._layer(f"bert.encoder.layer.{layer}", hidden, mask, bias)
        return hidden

    def array(self, name: str) -> np.ndarray:
        """A weight of the checkpoint, fp32.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self._state:
            raise UserError(f"the checkpoint has no {name}")
        array: np.ndarray = self._state[name].detach().float().cpu().numpy()
        return array

    def weight(self, name: str) -> str:
        """The same as a tensor of the graph."""
        return self.graph.weight(name, self.array(name))

    def dense(self, graph: Graph, name: str, x: str) -> str:
        """``x @ weight.T + bias``; the weight is stored ``[inputs, outputs]``, which dynamic quantisers look for."""
        weight = graph.weight(f"{name}.weight_transposed", self.array(f"{name}.weight").T)
        return graph.add("Add", graph.add("MatMul", x, weight), self.weight(f"{name}.bias"))

    def norm(self, graph: Graph, name: str, x: str) -> str:
        """LayerNorm over the last axis."""
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return graph.add("LayerNormalization", x, weight, bias, axis=-1, epsilon=self.config.layer_norm_eps)

    def _positions(self, graph: Graph) -> str:
        """0, 1, ... up to the length of the batch, int64 ``[sequence]``."""
        shape = graph.add("Shape", "input_ids")
        length = graph.add("Gather", shape, graph.constant(1), axis=0)
        return graph.add("Range", graph.constant(0), length, graph.constant(1))

    def _embeddings(self, graph: Graph, positions: str) -> str:
        base = "bert.embeddings"
        words = graph.add("Gather", self.weight(f"{base}.word_embeddings.weight"), "input_ids", axis=0)
        if self.config.type_vocab_size:
            types = self.weight(f"{base}.token_type_embeddings.weight")
            words = graph.add("Add", words, graph.add("Gather", types, "token_type_ids", axis=0))
        table = self.weight(f"{base}.position_embeddings.weight")
        hidden = graph.add("Add", words, graph.add("Gather", table, positions, axis=0))
        hidden = self.norm(graph, f"{base}.LayerNorm", hidden)
        if self.config.embedding_size != self.config.hidden_size:
            hidden = self.dense(graph, "bert.embeddings_project", hidden)
        return hidden

    def _mask(self, graph: Graph) -> str:
        """What is added to the scores, ``[batch, 1, 1, sequence]``."""
        # In two steps, which is the form that ONNX Runtime's optimiser knows.
        mask = graph.add(
            "Unsqueeze", graph.add("Unsqueeze", "attention_mask", graph.constant([1])), graph.constant([2])
        )
        hidden = graph.add("Sub", graph.constant(1.0), graph.add("Cast", mask, to=1))
        return graph.add("Mul", hidden, graph.constant(MASKED))

    def _relative_bias(self, graph: Graph, positions: str) -> str | None:
        """UniLM v2's bias of each pair of positions ``[1, heads, sequence, sequence]``."""
        config = self.config
        if not config.rel_pos_bins:
            return None
        limit = config.max_rel_pos
        buckets = relative_position_bucket(torch.arange(-limit, limit + 1), config.rel_pos_bins, limit).numpy()
        table = graph.weight("relative_bias_by_distance", self.array("bert.rel_pos_bias.weight")[:, buckets].T)
        keys = graph.add("Unsqueeze", positions, graph.constant([0]))
        queries = graph.add("Unsqueeze", positions, graph.constant([1]))
        low, high = graph.constant(-limit), graph.constant(limit)
        distance = graph.add("Clip", graph.add("Sub", keys, queries), low, high)
        pairs = graph.add("Gather", table, graph.add("Add", distance, high), axis=0)
        return graph.add("Unsqueeze", graph.add("Transpose", pairs, perm=[2, 0, 1]), graph.constant([0]))

    def _layer(self, base: str, x: str, mask: str, bias: str | None) -> str:
        attention = self.graph.scoped(f"{base}.attention")
        context = self.dense(
            attention, f"{base}.attention.output.dense", self._attention(attention, base, x, mask, bias)
        )
        x = self.norm(attention, f"{base}.attention.output.LayerNorm", attention.add("Add", context, x))
        feed = self.graph.scoped(f"{base}.feed_forward")
        inner = self.activation(feed, self.config.hidden_act, self.dense(feed, f"{base}.intermediate.dense", x))
        output = self.dense(feed, f"{base}.output.dense", inner)
        return self.norm(feed, f"{base}.output.LayerNorm", feed.add("Add", output, x))

    def _attention(self, graph: Graph, base: str, x: str, mask: str, bias: str | None) -> str:
        heads, size = self.config.num_attention_heads, self.config.head_size
        apart, together = graph.constant([0, 0, heads, size]), graph.constant([0, 0, heads * size])

        def split(part: str, perm: list[int]) -> str:
            rows = graph.add("Reshape", self.dense(graph, f"{base}.attention.self.{part}", x), apart)
            return graph.add("Transpose", rows, perm=perm)

        query, key, value = split("query", [0, 2, 1, 3]), split("key", [0, 2, 3, 1]), split("value", [0, 2, 1, 3])
        scores = graph.add("Div", graph.add("MatMul", query, key), graph.constant(math.sqrt(size)))
        if bias is not None:
            scores = graph.add("Add", scores, bias)
        weights = graph.add("Softmax", graph.add("Add", scores, mask), axis=-1)
        context = graph.add("Transpose", graph.add("MatMul", weights, value), perm=[0, 2, 1, 3])
        return graph.add("Reshape", context, together)

    def activation(self, graph: Graph, name: str, x: str) -> str:
        """One of the activations that a configuration can name."""
        return _ACTIVATIONS[name](graph, x)


def _gelu(graph: Graph, x: str) -> str:
    """Exact GELU, in the form that runtimes recognise and fuse."""
    erf = graph.add("Erf", graph.add("Div", x, graph.constant(math.sqrt(2.0))))
    product = graph.add("Mul", x, graph.add("Add", erf, graph.constant(1.0)))
    return graph.add("Mul", product, graph.constant(0.5))


def _gelu_new(graph: Graph, x: str) -> str:
    """GELU with tanh (arXiv:1606.08415, section 2)."""
    cube = graph.add("Mul", graph.add("Mul", graph.add("Mul", x, x), x), graph.constant(0.044715))
    inner = graph.add("Mul", graph.add("Add", x, cube), graph.constant(math.sqrt(2.0 / math.pi)))
    half = graph.add("Mul", x, graph.constant(0.5))
    return graph.add("Mul", half, graph.add("Add", graph.add("Tanh", inner), graph.constant(1.0)))


_ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_new,
    "relu": lambda graph, x: graph.add("Relu", x),
    "silu": lambda graph, x: graph.add("Mul", x, graph.add("Sigmoid", x)),
}


def hidden_states(build: GraphBuilder) -> None:
    """Output ``last_hidden_state [batch, sequence, hidden]``."""
    build.graph.output("last_hidden_state", build.encoder(), (BATCH, LENGTH, build.config.hidden_size))


def embeddings(build: GraphBuilder, pooling: str, normalize: bool) -> None:
    """Output ``sentence_embedding [batch, hidden]``: the mean of the tokens, or the first; maybe of length 1."""
    hidden, graph = build.encoder(), build.graph.scoped("pooling")
    pooled = _mean(graph, hidden) if pooling == "mean" else _first(graph, hidden)
    if normalize:
        # As torch.nn.functional.normalize does: the divisor is at least 1e-12.
        length = graph.add("ReduceL2", pooled, axes=[-1], keepdims=1)
        pooled = graph.add("Div", pooled, graph.add("Max", length, graph.constant(1e-12)))
    build.graph.output("sentence_embedding", pooled, (BATCH, build.config.hidden_size))


def _mean(graph: Graph, hidden: str) -> str:
    mask = graph.add("Cast", graph.add("Unsqueeze", "attention_mask", graph.constant([2])), to=1)
    total = graph.add("ReduceSum", graph.add("Mul", hidden, mask), graph.constant([1]), keepdims=0)
    count = graph.add("Max", graph.add("ReduceSum", mask, graph.constant([1]), keepdims=0), graph.constant(1e-9))
    return graph.add("Div", total, count)


def _first(graph: Graph, hidden: str) -> str:
    return graph.add("Gather", hidden, graph.constant(0), axis=1)


def sequence_classification(build: GraphBuilder) -> None:
    """Output ``logits [batch, labels]``."""
    hidden, graph = build.encoder(), build.graph.scoped("classifier")
    family = build.config.model_type
    bert_like = family not in (*ROBERTA_TYPES, "electra")
    dense, classifier = (
        ("bert.pooler.dense", "classifier") if bert_like else ("classifier.dense", "classifier.out_proj")
    )
    pooled = build.dense(graph, dense, _first(graph, hidden))
    pooled = build.activation(graph, "gelu", pooled) if family == "electra" else graph.add("Tanh", pooled)
    logits = build.dense(graph, classifier, pooled)
    build.graph.output("logits", logits, (BATCH, _labels(build, classifier)))


def token_classification(build: GraphBuilder) -> None:
    """Output ``logits [batch, sequence, labels]``."""
    logits = build.dense(build.graph.scoped("classifier"), "classifier", build.encoder())
    build.graph.output("logits", logits, (BATCH, LENGTH, _labels(build, "classifier")))


def question_answering(build: GraphBuilder) -> None:
    """Outputs ``start_logits`` and ``end_logits``, each ``[batch, sequence]``."""
    if (labels := _labels(build, "qa_outputs")) != 2:
        raise UserError(f"qa_outputs has {labels} outputs, the start and the end of a span were expected")
    graph = build.graph.scoped("qa_outputs")
    logits = build.dense(graph, "qa_outputs", build.encoder())
    for place, name in enumerate(("start_logits", "end_logits")):
        chosen = graph.add("Gather", logits, graph.constant(place), axis=2)
        build.graph.output(name, chosen, (BATCH, LENGTH))


def masked_lm(build: GraphBuilder) -> None:
    """Output ``logits [batch, sequence, vocabulary]``."""
    config, graph, base = build.config, build.graph.scoped("predictions"), "cls.predictions"
    hidden = build.dense(graph, f"{base}.transform.dense", build.encoder())
    hidden = build.activation(graph, lm_head_activation(config), hidden)
    hidden = build.norm(graph, f"{base}.transform.LayerNorm", hidden)
    if config.tie_word_embeddings:
        # Transposed in the graph, so that the file holds the word embeddings once.
        table = graph.add("Transpose", build.weight("bert.embeddings.word_embeddings.weight"))
    else:
        table = graph.weight(f"{base}.decoder.weight_transposed", build.array(f"{base}.decoder.weight").T)
    logits = graph.add("Add", graph.add("MatMul", hidden, table), build.weight(f"{base}.bias"))
    build.graph.output("logits", logits, (BATCH, LENGTH, config.vocab_size))


def _labels(build: GraphBuilder, name: str) -> int:
    return int(build.array(f"{name}.weight").shape[0])
