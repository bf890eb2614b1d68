"""Real sources of mixed lengths: what packing, early exit and continuous batching each bring.

python benchmarks/mixed_lengths.py --data dev.jsonl.xz --model examples/question-generation/model --limit 512
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import corpus
import machine
from harness import Series
from report import table

from minilm_fast.errors import UserError

if TYPE_CHECKING:
    from minilm_fast import Model


@dataclass(frozen=True)
class Variant:
    """One way of decoding the same sources.

    Without ``packing`` each source is filled up with ``[PAD]`` to the longest of its batch, as a padded
    implementation would have to; the pads cost what they cost there, and as the engine has no mask for them the
    outputs mean nothing. So padded variants always run all steps, whose cost does not depend on what is put out.
    ``sort``: batches of sources of similar length.
    """

    name: str
    packing: bool
    early_exit: bool
    continuous: bool
    sort: bool = True


VARIANTS = (
    Variant("padded, file order", packing=False, early_exit=False, continuous=False, sort=False),
    Variant("padded, by length", packing=False, early_exit=False, continuous=False),
    Variant("packed", packing=True, early_exit=False, continuous=False),
    Variant("packed, continuous", packing=True, early_exit=False, continuous=True),
    Variant("packed, early exit", packing=True, early_exit=True, continuous=False),
    Variant("packed, early exit, continuous", packing=True, early_exit=True, continuous=True),
)


def batches(sources: list[list[str]], variant: Variant, size: int, pad: str) -> list[list[list[str]]]:
    """What each call of ``generate`` gets: everything when packed, one padded batch a call otherwise."""
    if variant.packing:
        return [sources]
    ordered = sorted(sources, key=len, reverse=True) if variant.sort else sources
    groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [[s + [pad] * (max(map(len, group)) - len(s)) for s in group] for group in groups]


def decode(
    model: Model, calls: list[list[list[str]]], variant: Variant, options: argparse.Namespace
) -> list[list[int]]:
    """Decode with one variant; the ids of every output."""
    ids = []
    for call in calls:
        results = model.generate(
            call,
            dtype=options.dtype,
            early_exit=variant.early_exit,
            continuous_batching=variant.continuous,
            **corpus.search_options(options),
        )
        ids += [result.ids for result in results]
    return ids


def measure(model: Model, sources: list[list[str]], options: argparse.Namespace) -> dict[str, Any]:
    """All variants, in interleaved rounds.

    Raises:
        RuntimeError: two packed variants gave different outputs.
    """
    assert model.tokenizer is not None
    series = {variant.name: Series() for variant in VARIANTS}
    reference: list[list[int]] = []
    decode(model, [sources[: options.batch]], VARIANTS[-1], options)
    for number in range(options.rounds):
        for variant in VARIANTS:
            calls = batches(sources, variant, options.batch, model.tokenizer.pad_token)
            wall, cpu = time.perf_counter(), time.process_time()
            ids = decode(model, calls, variant, options)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            series[variant.name].runs.append({"wall": wall, "cpu": cpu, "sequences": len(ids)})
            print(f"round {number + 1}/{options.rounds}: {variant.name}: {wall:.1f} s", file=sys.stderr, flush=True)
            if variant.packing:
                reference = reference or ids
                if ids != reference:
                    raise RuntimeError(f"{variant.name}: outputs differ from those of the other packed variants")
    return {
        "machine": machine.describe(),
        "model": asdict(model.config),
        "dtype": options.dtype,
        "threads": options.threads,
        "search": corpus.search_options(options),
        "sources": len(sources),
        "source_tokens": sum(map(len, sources)),
        "output_tokens": sum(map(len, reference)),
        "runs": {name: of.runs for name, of in series.items()},
    }


def text(results: dict[str, Any]) -> str:
    """The table."""
    count = results["sources"]
    series = {name: Series(runs) for name, runs in results["runs"].items()}
    slowest = series[VARIANTS[0].name]
    rows = []
    for variant in VARIANTS:
        mine = series[variant.name]
        switches = ["on" if on else "off" for on in (variant.packing, variant.early_exit, variant.continuous)]
        rows.append(
            [
                variant.name,
                *switches,
                f"{1 / mine.median('wall'):.2f}",
                f"{mine.median('cpu'):.4f}",
                f"{slowest.ratio_to(mine, 'cpu'):.2f}x",
            ]
        )
    model = results["model"]
    heading = (
        f"{results['machine']['cpu']}, {results['threads']} threads, {results['dtype']}\n"
        f"L{model['num_hidden_layers']}-H{model['hidden_size']}, batch {results['search']['batch_size']}, beam "
        f"{results['search']['beam_size']}, at most {results['search']['max_tgt_length']} steps; {count} sources of "
        f"{results['source_tokens'] / count:.1f} tokens on average, outputs of {results['output_tokens'] / count:.1f}"
    )
    header = ["", "packing", "early exit", "continuous", "sentences/s", "cpu-s each", "less cpu by"]
    note = "Tokens in, ids and text out. All packed variants gave the same outputs. Medians over the rounds."
    return "\n\n".join([heading, table(header, rows), note])


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    corpus.add_arguments(parser, limit=512)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        sources = corpus.read_sources(options)
        model = corpus.load_model(options)
        results = measure(model, corpus.tokenize(model, sources, options), options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
