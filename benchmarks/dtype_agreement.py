"""How often bf16 and int8 weights give the same output as fp32, and how far the scores move.

python benchmarks/dtype_agreement.py --data dev.jsonl.xz --model examples/question-generation/model --limit 500
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
LOWER = ("bf16", "int8")


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
        f"{results['machine']['cpu']}; compared with {REFERENCE}, mean score {results['mean_score']:.4f}\n"
        "A score is the sum of the log-probabilities of an output."
    )
    return "\n\n".join([heading, table(header, rows)])


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    corpus.add_arguments(parser, limit=500)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N outputs that differ, for each dtype")
    return parser.parse_args(arguments)


def show(reference: list[Any], lower: list[Any], dtype: str, count: int) -> None:
    """Print the first outputs that differ."""
    differing = [(a, b) for a, b in zip(reference, lower, strict=True) if a.ids != b.ids]
    for a, b in differing[:count]:
        print(f"{REFERENCE} {a.score:9.4f}  {a.text}\n{dtype} {b.score:9.4f}  {b.text}\n")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        sources = corpus.read_sources(options)
        model = corpus.load_model(options)
        outputs = {}
        for dtype in (REFERENCE, *LOWER):
            print(f"decoding {len(sources)} sources in {dtype}", file=sys.stderr, flush=True)
            outputs[dtype] = model.generate(sources, dtype=dtype, **corpus.search_options(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = {
        "machine": machine.describe(),
        "model": asdict(model.config),
        "search": corpus.search_options(options),
        "mean_score": statistics.fmean(result.score for result in outputs[REFERENCE]),
        "agreement": {dtype: compare(outputs[REFERENCE], outputs[dtype]) for dtype in LOWER},
    }
    print(text(results))
    for dtype in LOWER:
        show(outputs[REFERENCE], outputs[dtype], dtype, options.show)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
