"""What bf16 and int8 cost: accuracy of a classifier of single sentences, and cosines of embeddings.

    python benchmarks/formats.py --classifier sst-2 --dev SST-2/dev.tsv --embedder MODEL --pairs MRPC/dev.tsv

The same weights go through the packed encoder in each format.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from minilm_fast.data.classification import make_classification_features
from minilm_fast.data.glue import glue_task, read_glue
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.modeling.heads import HeadInput
from minilm_fast.modeling.model import Model
from minilm_fast.modeling.packed_encoder import PackedEncoder, WeightReader
from minilm_fast.training.loading import load_with_tokenizer, make_classifier

FORMATS = ("fp32", "bf16", "int8")
BATCH = 64


def class_scores(folder: str, dev: Path, task: str, limit: int | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Logits in each format, and the labels, of a classifier's sentences."""
    loaded, tokenizer = load_with_tokenizer(folder)
    state = {**loaded.state, **loaded.extra_state}
    spec = glue_task(task)
    head, labels = make_classifier(loaded, spec.labels, spec.meanings, fresh_head=False)
    head.eval()
    features = make_classification_features(read_glue(dev, task, labels)[:limit], tokenizer, 128)
    sequences = [features[i].input_ids for i in range(len(features))]
    scores: dict[str, np.ndarray] = {}
    for dtype in FORMATS:
        encoder = PackedEncoder(WeightReader(loaded.config, state, dtype))
        found = []
        for start in range(0, len(sequences), BATCH):
            tokens = TokenBatch.from_sequences(sequences[start : start + BATCH])
            hidden = encoder.hidden_states(tokens.input_ids, tokens.position_ids, tokens.layout)
            batch = HeadInput.from_packed(loaded.config, tokens)
            found.append(head.head(batch.first_tokens(hidden), batch).numpy())
        scores[dtype] = np.concatenate(found)
    return scores, np.asarray(features.labels)


def report_classes(scores: dict[str, np.ndarray], labels: np.ndarray) -> list[str]:
    """Lines: accuracy in each format, and how many predictions differ from those in fp32."""
    reference = scores["fp32"].argmax(1)
    lines = [f"{len(labels)} sentences", "format  accuracy  predictions that differ from fp32"]
    for dtype, logits in scores.items():
        found = logits.argmax(1)
        lines.append(f"{dtype:6}  {100 * (found == labels).mean():7.2f}%  {(found != reference).sum()}")
    return lines


def report_embeddings(model: str, pairs: Path, limit: int | None) -> list[str]:
    """Lines: how far vectors, and the cosines of pairs, are from those in fp32."""
    examples = read_glue(pairs, "mrpc")[:limit]
    texts = [text for example in examples for text in example.texts]
    encoder = Model.from_pretrained(model)
    vectors = {dtype: np.asarray(encoder.encode(texts, dtype=dtype, normalize=True)) for dtype in FORMATS}
    reference = vectors["fp32"]
    cosines = (reference[::2] * reference[1::2]).sum(1)
    nearest = _nearest(reference)
    lines = [
        f"{len(examples)} pairs",
        "format  cosine to fp32: mean, least  |cosine of a pair|: mean, largest  nearest",
    ]
    for dtype, found in vectors.items():
        own = (found * reference).sum(1)
        apart = np.abs((found[::2] * found[1::2]).sum(1) - cosines)
        same = 100 * (_nearest(found) == nearest).mean()
        lines.append(
            f"{dtype:6}  {own.mean():18.5f} {own.min():8.5f}  {apart.mean():23.5f} {apart.max():8.5f}  {same:6.1f}%"
        )
    return lines


def _nearest(vectors: np.ndarray) -> np.ndarray:
    """The nearest other vector of each."""
    products = vectors @ vectors.T
    np.fill_diagonal(products, -2)
    return products.argmax(1)


@torch.inference_mode()
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--classifier", help="checkpoint of a task with one sentence")
    parser.add_argument("--task", default="sst-2")
    parser.add_argument("--dev", type=Path, help="its labelled sentences")
    parser.add_argument("--embedder", help="checkpoint of sentence embeddings")
    parser.add_argument("--pairs", type=Path, help="MRPC's file of pairs")
    parser.add_argument("--limit", type=int, help="so many examples of each")
    args = parser.parse_args()
    if (args.classifier is None) != (args.dev is None) or (args.embedder is None) != (args.pairs is None):
        parser.error("--classifier goes with --dev, --embedder with --pairs")
    if args.classifier is not None:
        print("\n".join(report_classes(*class_scores(args.classifier, args.dev, args.task, args.limit))))
    if args.embedder is not None:
        print("\n".join(report_embeddings(args.embedder, args.pairs, args.limit)))


if __name__ == "__main__":
    main()
