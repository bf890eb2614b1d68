"""Plots what a training run recorded at its checkpoints.

    python benchmarks/plot_history.py RUN/history.json --out run.png

One panel for the training and dev loss, one for the scores of generated texts, over the examples that were seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def panels(records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The measures by panel: losses, and scores in percent."""
    names = [name for name in records[-1] if name not in ("step", "learning_rate", "skipped_steps")]
    losses = [name for name in names if "loss" in name]
    scores = [name for name in names if name not in losses]
    return {title: found for title, found in (("loss of a predicted token", losses), ("score, %", scores)) if found}


def plot(records: list[dict[str, Any]], batch: int, out: Path) -> None:
    """Writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = panels(records)
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5 * len(shown), 3.6), squeeze=False)
    seen = [record["step"] * batch for record in records]
    for axis, (title, names) in zip(axes[0], shown.items(), strict=True):
        for name in names:
            axis.plot(seen, [record.get(name) for record in records], marker=".", label=name)
        axis.set_xlabel("examples" if batch > 1 else "step")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=130)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("history", type=Path)
    parser.add_argument("--batch", type=int, default=1, help="examples of a step; by default steps are plotted")
    parser.add_argument("--out", type=Path, required=True, help="picture, such as run.png")
    options = parser.parse_args(argv)
    try:
        records = json.loads(options.history.read_text(encoding="utf-8"))["records"]
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {options.history} is no history of a run: {error}", file=sys.stderr)
        return 2
    if not records:
        print(f"error: {options.history} records no checkpoint", file=sys.stderr)
        return 2
    plot(records, options.batch, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
