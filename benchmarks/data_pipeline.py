"""Speed and memory of the training data's way to samples, and what an order of batches does to the weight of a label.

    python benchmarks/data_pipeline.py --data train.jsonl.xz

Everything is done by one process. Speeds are per second of its CPU time, so that what else the machine does matters
less; memory is that of a fresh process that does only this.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import machine
import numpy as np
from report import table

from minilm_fast.data.feature_cache import build_cache, open_cache
from minilm_fast.data.features import FeatureStore, read_features, special_ids
from minilm_fast.data.masking import MASK_WAYS, Masking, make_masker
from minilm_fast.data.orders import BatchOrder, LengthGroupedBatches, TokenBudgetBatches, label_weights
from minilm_fast.tokenization import Tokenizer

VOCABULARY = Path(__file__).resolve().parents[1] / "examples" / "question-generation" / "vocab.txt"
TENTHS = (0, 4, 9)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="JSON lines, plain, gzip or xz")
    parser.add_argument("--vocab", type=Path, default=VOCABULARY, help="uncased vocabulary")
    parser.add_argument("--max-source", type=int, default=464)
    parser.add_argument("--max-target", type=int, default=48)
    parser.add_argument("--batch-sizes", default="8,64")
    parser.add_argument("--epochs", type=int, default=24, help="epochs over which the weight of a label is averaged")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures")
    return parser.parse_args(argv)


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    return Tokenizer.from_pretrained(options.vocab, do_lower_case=True)


def _seconds(work: Callable[[], Any]) -> float:
    """CPU seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _memory() -> dict[str, int]:
    """Resident bytes of this process: its own, and those of mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return {name: int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssFile")}


def _go_through(store: FeatureStore) -> float:
    order = list(range(len(store)))
    random.Random(0).shuffle(order)
    return _seconds(lambda: deque(map(store.__getitem__, order), maxlen=0))


def in_memory(options: argparse.Namespace) -> dict[str, float]:
    """Reading and tokenising into memory, then all features in a random order."""
    tokenizer = _tokenizer(options)
    before, start = _memory(), time.process_time()
    store = read_features(options.data, tokenizer)
    result = {"examples": len(store), "read_s": time.process_time() - start, "get_s": _go_through(store)}
    return result | _growth(before)


def cached(options: argparse.Namespace, cache: Path) -> dict[str, float]:
    """Building the cache, or checking one that is there; then opening it and all features in a random order."""
    import datasets  # noqa: F401 - its own size is no part of the features'

    tokenizer = _tokenizer(options)
    before = _memory()
    build_s = _seconds(lambda: build_cache(options.data, tokenizer, cache))
    start = time.process_time()
    store = open_cache(options.data, tokenizer, cache)
    result = {"build_s": build_s, "open_s": time.process_time() - start, "get_s": _go_through(store)}
    return result | _growth(before) | {"file_bytes": cache.stat().st_size}


def _growth(before: dict[str, int]) -> dict[str, float]:
    after = _memory()
    return {name: after[name] - before[name] for name in before}


def masked_per_second(options: argparse.Namespace, store: FeatureStore) -> dict[str, float]:
    """Samples a second of each way, without and with a masked source, features decoded beforehand."""
    special = special_ids(_tokenizer(options))
    features = list(store[: 1 << 13])
    found = {}
    for mask_way in MASK_WAYS:
        for share in (-1.0, 0.15):
            masking = Masking(source_mask_prob=share)
            masker = make_masker(mask_way, special, masking, options.max_source, options.max_target, random.Random(0))
            # A sample lives no longer than its batch: keeping them all would measure the garbage collector.
            rounds = [_seconds(lambda masker=masker: deque(map(masker, features), maxlen=0)) for _ in range(5)]
            name = mask_way if share < 0 else f"{mask_way}, source masked"
            found[name] = len(features) / sorted(rounds)[2]
    return found


def orders(lengths: np.ndarray, batch_size: int) -> dict[str, BatchOrder]:
    """Orders of batches of about the same number of tokens."""
    tokens = max(int(lengths.mean() * batch_size), int(lengths.max()))
    return {
        f"shuffled, {batch_size} examples": LengthGroupedBatches(np.zeros_like(lengths), batch_size, 0),
        f"by length, {batch_size} examples": LengthGroupedBatches(lengths, batch_size, 0),
        f"by length, {tokens} tokens": TokenBudgetBatches(lengths, tokens, 0),
        f"shuffled, {tokens} tokens": TokenBudgetBatches(lengths, tokens, 0, by_length=False),
    }


def weights_of_tenths(
    order: BatchOrder, epochs: int, predictions: np.ndarray, keys: Iterable[np.ndarray]
) -> list[list[float]]:
    """Mean weight of a label in the tenths of the examples that each key sorts."""
    batches = [order[n] for n in range(order.batches_in(epochs))]
    weights = label_weights(batches, predictions) * predictions
    found = []
    for key in keys:
        parts = np.array_split(np.argsort(key, kind="stable"), 10)
        found.append([float(weights[part].sum() / predictions[part].sum()) for part in parts])
    return found


def order_weights(options: argparse.Namespace, store: FeatureStore) -> dict[str, list[list[float]]]:
    """For each order the weights by length of the sequence and by length of the target."""
    special = special_ids(_tokenizer(options))
    masker = make_masker("v2", special, Masking(), options.max_source, options.max_target, random.Random(0))
    source, target = store.lengths()
    lengths, predictions = sum(masker.segments(source, target)), masker.predictions(target)
    return {
        name: weights_of_tenths(order, options.epochs, predictions, (lengths, target))
        for batch_size in map(int, options.batch_sizes.split(","))
        for name, order in orders(lengths, batch_size).items()
    }


def _print(results: dict[str, Any]) -> None:
    memory, first, again = results["in_memory"], results["built"], results["found"]
    examples = memory["examples"]
    rows = [
        ["tokenised features/s", f"{examples / memory['read_s']:.0f}"],
        ["into the cache, features/s", f"{examples / first['build_s']:.0f}"],
        ["cache that is there: check, s", f"{again['build_s']:.2f}"],
        ["open the cache, s", f"{again['open_s']:.3f}"],
        ["size of the cache, MB", f"{first['file_bytes'] / 1e6:.1f}"],
        ["features/s in random order, in memory", f"{examples / memory['get_s']:.0f}"],
        ["features/s in random order, mapped", f"{examples / again['get_s']:.0f}"],
        ["memory of its own, in memory, MB", f"{memory['RssAnon'] / 1e6:.0f}"],
        ["memory of its own, mapped, MB", f"{again['RssAnon'] / 1e6:.0f}"],
        ["mapped pages, which ranks share, MB", f"{again['RssFile'] / 1e6:.0f}"],
        *([f"samples/s, {name}", f"{value:.0f}"] for name, value in results["masked"].items()),
    ]
    print(table([f"{examples} examples", ""], rows), end="\n\n")
    header = ["weight of a label"] + [f"{what} {i + 1}/10" for what in ("length", "target") for i in TENTHS]
    shown = [
        [name, *(f"{tenths[i]:.3f}" for tenths in both for i in TENTHS)] for name, both in results["weights"].items()
    ]
    print(table(header, shown))


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    options = parse(argv)
    results: dict[str, Any] = {"machine": machine.describe(), "data": options.data.name}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "features.arrow"
        for name, work, arguments in (
            ("in_memory", in_memory, (options,)),
            ("built", cached, (options, cache)),
            ("found", cached, (options, cache)),
        ):
            print(name, file=sys.stderr)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                results[name] = fresh.submit(work, *arguments).result()
        store = open_cache(options.data, _tokenizer(options), cache)
        results["masked"] = masked_per_second(options, store)
        results["weights"] = order_weights(options, store)
    _print(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
