"""How often lower precisions give the same output as fp32 on a CPU, and how far the scores move.

python benchmarks/dtype_agreement.py --data dev.jsonl.xz --model examples/question-generation --limit 500
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from typing import Any

import corpus
import machine
from report import table

from minilm_fast.errors import UserError

REFERENCE = "fp32"
COMPARED = {"cpu": ("bf16", "int8"), "cuda": ("fp32", "bf16", "fp16")}
"""What is compared with fp32 on the CPU, by the device that it runs on."""


def compare(reference: list[Any], lower: list[Any]) -> dict[str, Any]:
    """Equality of outputs and differences of scores between two lists of ``GenerationResult``."""
    pairs = list(zip(reference, lower, strict=True))
    differences = [abs(a.score - b.score) for a, b in pairs]
    equal = [a.ids == b.ids for a, b in pairs]
    same = [d for d, is_equal in zip(differences, equal, strict=True) if is_equal]
    return {
        "outputs": len(pairs),
        "equal_ids": sum(equal),
        "equal_text": sum(a.text == b.text for a, b in pairs),
        "largest_score_difference": max(differences),
        "largest_score_difference_of_equal_outputs": max(same, default=0.0),
        "mean_score_difference": statistics.fmean(differences),
        "mean_score": statistics.fmean(b.score for _, b in pairs),
    }


def text(results: dict[str, Any]) -> str:
    """The table."""
    rows = [
        [
            dtype,
            f"{found['equal_ids']}/{found['outputs']}",
            f"{found['equal_text']}/{found['outputs']}",
            f"{found['largest_score_difference_of_equal_outputs']:.4f}",
            f"{found['largest_score_difference']:.4f}",
            f"{found['mean_score_difference']:.4f}",
            f"{found['mean_score']:.4f}",
        ]
        for dtype, found in results["agreement"].items()
    ]
    header = [
        "weights",
        "equal ids",
        "equal text",
        "max |diff| (equal)",
        "max |diff| (all)",
        "mean |diff|",
        "mean score",
    ]
    heading = (
        f"{results['device']} compared with {REFERENCE} on {results['machine']['cpu']}, "
        f"mean score {results['mean_score']:.4f}\n"
        "A score is the sum of the log-probabilities of an output."
    )
    return "\n\n".join([heading, table(header, rows)])


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    corpus.add_arguments(parser, limit=500)
    parser.add_argument("--device", choices=list(COMPARED), default="cpu", help="where what is compared runs")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N outputs that differ, for each dtype")
    return parser.parse_args(arguments)


def show(reference: list[Any], lower: list[Any], dtype: str, count: int) -> None:
    """Print the first outputs that differ."""
    differing = [(a, b) for a, b in zip(reference, lower, strict=True) if a.ids != b.ids]
    for a, b in differing[:count]:
        print(f"{REFERENCE} {a.score:9.4f}  {a.text}\n{dtype} {b.score:9.4f}  {b.text}\n")


def decode(model: Any, sources: list[Any], dtype: str, device: str, options: argparse.Namespace) -> list[Any]:
    """What ``Model.generate`` gives, after a line that says what it is doing."""
    print(f"decoding {len(sources)} sources in {dtype} on {device}", file=sys.stderr, flush=True)
    return model.generate(sources, dtype=dtype, device=device, **corpus.search_options(options))


def device_name(device: str) -> str:
    """The device in words."""
    import torch

    return torch.cuda.get_device_name(0) if device == "cuda" else "the CPU"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        sources = corpus.read_sources(options)
        model = corpus.load_model(options)
        outputs = {dtype: decode(model, sources, dtype, options.device, options) for dtype in COMPARED[options.device]}
        reference = decode(model, sources, REFERENCE, "cpu", options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = {
        "machine": machine.describe(),
        "device": device_name(options.device),
        "model": asdict(model.config),
        "search": corpus.search_options(options),
        "mean_score": statistics.fmean(result.score for result in reference),
        "agreement": {dtype: compare(reference, found) for dtype, found in outputs.items()},
    }
    print(text(results))
    for dtype, found in outputs.items():
        show(reference, found, dtype, options.show)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
