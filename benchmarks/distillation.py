"""Where the time of a distillation step goes, and how a run's losses fell.

python benchmarks/distillation.py split --length 512 --batch 4 --dtypes fp32,bf16 --threads 2
python benchmarks/distillation.py plot RUN/history.json OTHER/history.json --out losses.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
from report import table
from shapes import SHAPES, ModelShape

PARTS = ("teacher", "student forward", "loss forward", "loss backward", "student backward", "optimiser")
_RELATION_NAMES = {a + b for a in "qkv" for b in "qkv"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    split = commands.add_parser("split", help="time of teacher, student and loss in a step")
    split.add_argument("--teacher", choices=sorted(SHAPES), default="bert-base")
    split.add_argument("--student", choices=sorted(SHAPES), default="l6-h384")
    split.add_argument("--length", type=int, default=512, help="tokens of every sequence")
    split.add_argument("--batch", type=int, default=4)
    split.add_argument("--presets", default="v1,v2")
    split.add_argument("--dtypes", default="fp32,bf16")
    split.add_argument("--dropout", type=float, default=0.1)
    split.add_argument("--threads", type=int, default=2)
    split.add_argument("--rounds", type=int, default=5)
    split.add_argument("--json", type=Path, metavar="PATH", help="write the figures")
    plot = commands.add_parser("plot", help="losses of runs over their steps")
    plot.add_argument("history", nargs="+", type=Path, help="history.json of a run")
    plot.add_argument("--out", type=Path, required=True, help="picture, such as losses.png")
    return parser.parse_args(argv)


class Step:
    """One optimiser step, a part at a time.

    Args:
        teacher, student: shapes; random weights.
        preset: ``"v1"`` or ``"v2"``.
        dtype: ``"fp32"`` or ``"bf16"``.
    """

    def __init__(self, teacher: ModelShape, student: ModelShape, preset: str, dtype: str, dropout: float) -> None:
        import torch

        from minilm_fast.distillation import Distiller, FrozenEncoder
        from minilm_fast.distillation.presets import pairing
        from minilm_fast.distillation.sides import MODULES
        from minilm_fast.distillation.student import Student, freeze_untrained
        from minilm_fast.training.optimizer import AdamW, parameter_groups
        from minilm_fast.training.precision import Precision

        torch.manual_seed(0)
        state = Student(_config(teacher, 0.0)).checkpoint_state()
        self.student = Student(_config(student, dropout)).train()
        pair = pairing(preset, _config(teacher, 0.0), self.student.config, None, None)
        self.distiller = Distiller(
            FrozenEncoder(_config(teacher, 0.0), state, dtype=dtype),
            self.student,
            preset,
            relation_heads=pair.relation_heads,
        )
        freeze_untrained(self.student, student.layers, [MODULES[name] for name in self.distiller.names])
        self.precision = Precision(dtype, torch.device("cpu"))
        self.optimizer = AdamW(parameter_groups(self.student, 0.01), lr=1e-4)

    def run(self, batch: Any) -> dict[str, tuple[float, float]]:
        """Seconds on the clock and of the process' CPU time, by part."""
        import torch

        found: dict[str, tuple[float, float]] = {}

        def timed(part: str, work: Callable[[], Any]) -> Any:
            start = time.perf_counter(), time.process_time()
            result = work()
            found[part] = time.perf_counter() - start[0], time.process_time() - start[1]
            return result

        def student() -> Any:
            with self.precision.autocast():
                return self.distiller.student_vectors(batch)

        teacher = timed("teacher", lambda: self.distiller.teacher_vectors(batch))
        vectors = timed("student forward", student)
        leaves = {name: x.detach().requires_grad_() for name, x in vectors.items()}
        loss = timed("loss forward", lambda: self.distiller.compare(teacher, leaves, batch.layout).loss)
        timed("loss backward", loss.backward)
        grads = [leaves[name].grad for name in vectors]
        timed("student backward", lambda: torch.autograd.backward(list(vectors.values()), grads))

        def update() -> None:
            self.precision.clip(self.optimizer, self.student, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        timed("optimiser", update)
        return found


def _config(shape: ModelShape, dropout: float) -> Any:

    return shape.config(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians over interleaved rounds, after one step that does not count."""
    import torch

    from minilm_fast.data.token_batch import TokenBatch

    torch.set_num_threads(options.threads)
    teacher, student = SHAPES[options.teacher], SHAPES[options.student]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, teacher.vocab, (options.batch, options.length), generator=generator)
    batch = TokenBatch.from_sequences(ids.tolist())
    kinds = [(preset, dtype) for dtype in options.dtypes.split(",") for preset in options.presets.split(",")]
    steps = {kind: Step(teacher, student, *kind, options.dropout) for kind in kinds}
    times: dict[tuple[str, str], list[dict[str, tuple[float, float]]]] = {kind: [] for kind in kinds}
    for round_number in range(options.rounds + 1):
        for kind, step in steps.items():
            found = step.run(batch)
            if round_number:
                times[kind].append(found)
            print(f"round {round_number} {' '.join(kind)}", file=sys.stderr)
    settings = ("teacher", "student", "length", "batch", "dropout", "threads", "rounds")
    return {
        "machine": machine.describe(),
        **{name: getattr(options, name) for name in settings},
        "runs": [
            {
                "preset": preset,
                "dtype": dtype,
                "seconds": {part: statistics.median(f[part][0] for f in rounds) for part in PARTS},
                "cpu_seconds": {part: statistics.median(f[part][1] for f in rounds) for part in PARTS},
            }
            for (preset, dtype), rounds in times.items()
        ],
    }


def text(results: dict[str, Any]) -> str:
    """The table of :func:`measure`."""
    rows = []
    for run in results["runs"]:
        for kind in ("cpu_seconds", "seconds"):
            values = run[kind]
            total = sum(values.values())
            loss = values["loss forward"] + values["loss backward"]
            label = f"{run['preset']} {run['dtype']} {'cpu-s' if kind == 'cpu_seconds' else 's'}"
            cells = [f"{values[part]:.3f}" for part in PARTS]
            rows.append([label, *cells, f"{total:.3f}", f"{100 * loss / total:.1f}%"])
    return (
        f"teacher {results['teacher']}, student {results['student']}, {results['batch']} sequences of "
        f"{results['length']} tokens, {results['threads']} threads, median of {results['rounds']} steps\n"
        + table(["", *PARTS, "step", "loss"], rows)
    )


def curves(history: Path) -> dict[str, list[tuple[float, float]]]:
    """Points (step, value) of each relation, held-out ones where they were measured."""
    records = json.loads(history.read_text(encoding="utf-8"))["records"]
    names = sorted({name for record in records for name in record if name.removeprefix("dev_") in _RELATION_NAMES})
    held_out = [name for name in names if name.startswith("dev_")]
    return {name: [(r["step"], r[name]) for r in records if name in r] for name in held_out or names}


def plot(histories: list[Path], out: Path) -> None:
    """One panel a run, one line a relation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(histories), figsize=(4.5 * len(histories), 3.4), squeeze=False)
    for axis, history in zip(axes[0], histories, strict=True):
        for name, points in curves(history).items():
            axis.plot(*zip(*points, strict=True), marker=".", label=name.removeprefix("dev_").upper())
        axis.set_title(history.resolve().parent.name)
        axis.set_xlabel("step")
        axis.set_ylabel("held-out loss" if any(n.startswith("dev_") for n in curves(history)) else "loss")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=130)


def main() -> int:
    """Entry point."""
    options = parse()
    if options.command == "plot":
        plot(options.history, options.out)
        return 0
    results = measure(options)
    print(text(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
