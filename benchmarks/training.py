"""Training speed and memory next to the original's algorithm and to Hugging Face BERT, in one run.

    python benchmarks/training.py --data train.jsonl.xz --examples 256 --batch 16 --threads 2
    python benchmarks/training.py --lengths 464,48 --examples 64 --batch 16 --threads 2

A step is batch preparation, forward, backward, clipping and AdamW, dropout on. Tokens are real ones: source, target and
pseudo tokens, whatever a system pads them to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
from harness import Series, Unsupported, Worker, WorkerError
from report import disturbance, table
from shapes import SHAPES, ModelShape
from work import pseudo_masked_training

from minilm_fast.errors import UserError

SCRIPT = Path(__file__).resolve().parent / "training_worker.py"
VOCABULARY = Path(__file__).resolve().parents[1] / "examples" / "question-generation" / "vocab.txt"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="l6-h384")
    parser.add_argument("--systems", default="ours,original,hf", help="of: ours, original, hf")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--data", type=Path, metavar="PATH", help="take the lengths of these JSON lines, maybe .xz")
    parser.add_argument("--vocab", type=Path, default=VOCABULARY, help="uncased vocabulary that --data is cut with")
    parser.add_argument("--lengths", default="464,48", help="source and target tokens of every example, without --data")
    parser.add_argument("--max-source", type=int, default=464)
    parser.add_argument("--max-target", type=int, default=48)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures")
    return parser.parse_args(argv)


def example_lengths(options: argparse.Namespace) -> list[list[int]]:
    """Numbers of source and target tokens of each example, special tokens counted."""
    if options.data is None:
        source, target = (int(part) for part in options.lengths.split(","))
        return [[source, target]] * options.examples
    from minilm_fast.data.examples import read_examples
    from minilm_fast.data.features import make_features
    from minilm_fast.tokenization import Tokenizer

    tokenizer = Tokenizer.from_pretrained(options.vocab, model_type="bert", do_lower_case=True)
    examples = list(read_examples(options.data))
    examples = examples[:: max(1, len(examples) // options.examples)][: options.examples]
    features = make_features(examples, tokenizer)
    return [
        [min(len(f.source_ids) + 2, options.max_source), min(len(f.target_ids) + 1, options.max_target)]
        for f in features
    ]


def measure(options: argparse.Namespace, lengths: list[list[int]]) -> dict[str, Any]:
    """Interleaved rounds of all systems."""
    results: dict[str, Any] = {
        "machine": machine.describe(),
        "threads": options.threads,
        "shape": asdict(SHAPES[options.shape]),
        "batch": options.batch,
        "dropout": options.dropout,
        "lengths": lengths,
        "systems": [],
        "left_out": {},
    }
    with Worker("peak", options.threads, SCRIPT) as worker:
        results["peak_operations_per_second"] = worker.ask("peak", threads=options.threads)["peak"]
    with contextlib.ExitStack() as stack:
        running = []
        for dtype in options.dtypes.split(","):
            for name in options.systems.split(","):
                label = f"{name} {dtype}"
                worker = stack.enter_context(Worker(label, options.threads, SCRIPT))
                job = {
                    "shape": results["shape"],
                    "max_source": options.max_source,
                    "max_target": options.max_target,
                    "dropout": options.dropout,
                    "dtype": dtype,
                }
                try:
                    about = worker.ask(
                        "build", name=name, job=job, lengths=lengths, batch=options.batch, threads=options.threads,
                        seed=options.seed,
                    )  # fmt: skip
                except Unsupported as error:
                    results["left_out"][label] = str(error)
                    continue
                print(f"built {label}", file=sys.stderr, flush=True)
                system = {
                    "name": about["label"],
                    "dtype": dtype,
                    "settings": about["settings"],
                    "batch": [],
                    "alone": [],
                }
                results["systems"].append(system)
                running.append((worker, system))
        for number in range(options.rounds):
            for worker, system in running:
                system["batch"].append(worker.ask("run"))
                print(f"round {number + 1}: {system['name']} {system['dtype']}", file=sys.stderr, flush=True)
        for worker, system in running:
            system["memory"] = worker.ask("memory")["peak"]
    return results


def text(results: dict[str, Any]) -> str:
    """The tables."""
    shape = ModelShape(**results["shape"])
    lengths, peak = results["lengths"], results["peak_operations_per_second"]
    operations = sum(sum(pseudo_masked_training(shape, s, t)) for s, t in lengths) / len(lengths)
    tokens = sum(s + 2 * t for s, t in lengths) / len(lengths)
    rows, systems = [], results["systems"]
    for system in systems:
        series = Series(system["batch"])
        wall = series.median("wall")
        limit = operations / peak[system["dtype"]]["wall"]
        low, high = series.spread("wall")
        rows.append(
            [
                f"{system['name']} {system['dtype']}",
                f"{tokens / wall:,.0f}",
                f"{1 / wall:.2f} ({1 / high:.2f}-{1 / low:.2f})",
                f"{series.median('cpu'):.3f}",
                f"{100 * limit / wall:.0f}%",
                f"{system['memory'] / 1e6:,.0f}",
                f"{sum(run['others'] for run in system['batch']) / len(system['batch']):.1f}",
            ]
        )
    host = results["machine"]
    sources, targets = zip(*lengths, strict=True)
    heading = (
        f"{host['cpu']}, {host['cores']} cores ({', '.join(host['extensions'])}), {results['threads']} threads\n"
        f"{shape.name}, batch {results['batch']}, dropout {results['dropout']}; {len(lengths)} examples, source "
        f"{sum(sources) / len(lengths):.0f} (at most {max(sources)}), target {sum(targets) / len(lengths):.0f} "
        f"(at most {max(targets)}) tokens on average; {operations / 1e9:.1f} Gop a sequence"
    )
    header = ["training", "tokens/s", "sequences/s", "cpu-s a sequence", "of the limit", "peak MB", "others"]
    parts = [heading, "\n".join(f"{s['name']} {s['dtype']}: {s['settings']}" for s in systems), table(header, rows)]
    parts += [disturbance(results), _ratios(systems)]
    parts += [f"not measured: {name}: {why}" for name, why in results["left_out"].items()]
    return "\n\n".join(part for part in parts if part)


def _ratios(systems: list[dict[str, Any]]) -> str:
    rows = []
    for dtype in dict.fromkeys(system["dtype"] for system in systems):
        same = {system["name"]: system for system in systems if system["dtype"] == dtype}
        ours = same.pop("minilm_fast", None)
        if ours is None:
            continue
        for name, peer in same.items():
            faster = Series(peer["batch"]).ratio_to(Series(ours["batch"]), "wall")
            rows.append([f"{dtype}: than {name}", f"{faster:.2f}x", f"{ours['memory'] / peer['memory']:.2f}x"])
    return table(["minilm_fast", "times faster", "of its peak memory"], rows) if rows else ""


def main() -> int:
    """Measure and report."""
    options = parse()
    try:
        if options.json is not None and not options.json.parent.is_dir():
            raise UserError(f"--json {options.json}: there is no folder {options.json.parent}")
        results = measure(options, example_lengths(options))
    except (UserError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(text(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
