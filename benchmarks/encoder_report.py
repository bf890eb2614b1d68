"""Tables of what ``encoder.py`` measured.

    python benchmarks/encoder_report.py run.json --docs docs/encoder-speed.md

prints the tables of a saved run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder_texts import AS_THEY_COME, BY_LENGTH
from harness import Series
from peers.encoders import OURS
from report import TOLERATED, table
from shapes import ModelShape
from work import encoder

from minilm_fast.errors import UserError

BEGIN, END = "<!-- written by benchmarks/encoder.py -->", "<!-- end -->"
NOTE = (
    "Medians over the rounds, on the clock; least cpu-ms: CPU-milliseconds of all threads, the best round. "
    "Tokens are real ones: padding counts as time, never as work. Of the peak: "
    "what the products of the real tokens would take at the speed of torch's largest products in that dtype on these "
    "cores, over the time taken. Ours: how many times faster it is than the row, "
    "each ratio taken within a round. Others: cores that other processes kept busy. "
    "Difference, cosine: of embeddings of length 1, to those of the first system of the table."
)


@dataclass(frozen=True)
class Goal:
    """A ratio of speeds that is aimed at; ``mixed``: None for every case, else for that kind."""

    dtype: str
    peer: str
    factor: float
    mixed: bool | None = None


GOALS = (
    Goal("fp32", "torch eager fp32", 1.6, mixed=False),
    Goal("fp32", "torch eager fp32", 2.5, mixed=True),
    Goal("fp32", "openvino fp32", 1.0),
    Goal("bf16", "openvino bf16", 1.15),
    Goal("int8", "openvino int8", 1.1),
    Goal("int8", "onnxruntime int8", 2.0),
)


def text(results: dict[str, Any]) -> str:
    """All tables."""
    parts = [_heading(results)]
    for run in results["runs"]:
        parts.append(_peaks(run))
        parts += [_case(results, run, case) for case in results["cases"]]
        parts += [disturbance(results, run), _goals(results, run)]
        parts += [f"not measured: {name}: {why}" for name, why in run["left_out"].items()]
    return "\n\n".join(part for part in [*parts, NOTE] if part)


def label(system: dict[str, Any]) -> str:
    return f"{system['name']} {system['dtype']}"


def operations(results: dict[str, Any], case: dict[str, Any]) -> float:
    """Of the matrix products of one pass over a case."""
    shape = ModelShape(**results["shape"])
    return sum(encoder(shape, length) for length in case["lengths"])


def _heading(results: dict[str, Any]) -> str:
    host, shape = results["machine"], results["shape"]
    lines = [
        f"{host['cpu']}, {host['cores']} cores ({', '.join(host['extensions'])})",
        f"{shape['name']}, {results['model']}; token ids to embeddings (mean, length 1); texts: "
        f"{', '.join(results['texts']) or 'random words'}",
    ]
    for case in results["cases"]:
        lengths = case["lengths"]
        lines.append(
            f"{case['name']}: {case['sequences']} sequences of {_span(lengths)} tokens, "
            f"{case['tokens'] / case['sequences']:.1f} on average; {case['tokens']:,} in all, "
            f"{case['padded']:,} when padded"
        )
    systems = {label(s): f"{s['version']}; {s['settings']}" for run in results["runs"] for s in run["systems"]}
    return "\n".join(lines + [f"{name}: {about}" for name, about in systems.items()])


def _span(lengths: Sequence[int]) -> str:
    return f"{min(lengths)} to {max(lengths)}" if len(set(lengths)) > 1 else f"{lengths[0]}"


def _peaks(run: dict[str, Any]) -> str:
    rates = run["peak_operations_per_second"]
    peaks = ", ".join(f"{dtype} {peak['wall'] / 1e9:,.0f}" for dtype, peak in rates.items())
    return f"== {threads(run)}: measured peak of large products, Gop/s: {peaks}"


def threads(run: dict[str, Any]) -> str:
    return f"{run['threads']} thread" + ("s" if run["threads"] > 1 else "")


def tokens_a_second(run: dict[str, Any], name: str, case: dict[str, Any]) -> float | None:
    """Of a system by its label; None where it was not measured."""
    for system in run["systems"]:
        if label(system) == name:
            return float(case["tokens"] / _wall(system, case))
    return None


def _wall(system: dict[str, Any], case: dict[str, Any]) -> float:
    return Series(system["runs"][case["name"]]).median("wall") * case["sequences"]


def _case(results: dict[str, Any], run: dict[str, Any], case: dict[str, Any]) -> str:
    ours = [system for system in run["systems"] if system["name"] == OURS]
    header = [case["name"], "tokens/s", "ms (range)", "least cpu-ms", "of the peak", "others", "difference", "cosine"]
    header += [f"ours {system['dtype']}" for system in ours]
    rows = []
    for system in run["systems"]:
        series, scale = Series(system["runs"][case["name"]]), 1e3 * case["sequences"]
        wall = _wall(system, case)
        low, high = series.spread("wall")
        rate = operations(results, case) / wall
        agreement = system["agreement"][case["name"]]
        rows.append(
            [
                label(system),
                f"{case['tokens'] / wall:,.0f}",
                f"{1e3 * wall:,.2f} ({low * scale:,.2f}-{high * scale:,.2f})",
                f"{scale * series.spread('cpu')[0]:,.2f}",
                f"{100 * rate / run['peak_operations_per_second'][system['dtype']]['wall']:.0f}%",
                f"{sum(r['others'] for r in series.runs) / len(series.runs):.1f}",
                f"{agreement['difference']:.1g}",
                f"{agreement['mean_cosine']:.4f} (least {agreement['least_cosine']:.3f})",
                *(f"{series.ratio_to(Series(mine['runs'][case['name']]), 'wall'):.2f}x" for mine in ours),
            ]
        )
    return table(header, rows)


def disturbance(results: dict[str, Any], run: dict[str, Any]) -> str:
    """A warning if other processes took cores that the measured threads needed; else an empty text."""
    found = [r["others"] for system in run["systems"] for runs in system["runs"].values() for r in runs]
    worst = max(found, default=0.0)
    if worst + run["threads"] <= results["machine"]["cores"] + TOLERATED:
        return ""
    return f"WARNING: other processes kept up to {worst:.1f} cores busy: do not quote these figures or ratios."


def reached(run: dict[str, Any], goal: Goal, case: dict[str, Any]) -> float | None:
    """Times that ours is faster than the goal's peer in a case; None where either was not measured."""
    found = {label(system): Series(system["runs"][case["name"]]) for system in run["systems"]}
    mine, peer = found.get(f"{OURS} {goal.dtype}"), found.get(goal.peer)
    return None if mine is None or peer is None else peer.ratio_to(mine, "wall")


def _goals(results: dict[str, Any], run: dict[str, Any]) -> str:
    cases = results["cases"]
    rows = []
    for goal in GOALS:
        cells = []
        for case in cases:
            ratio = reached(run, goal, case)
            if ratio is None or goal.mixed not in (None, case["name"] in (AS_THEY_COME, BY_LENGTH)):
                cells.append("")
            else:
                cells.append(f"{ratio:.2f}x {'met' if ratio >= goal.factor else 'MISSED'}")
        if any(cells):
            rows.append([f"{goal.dtype}: {goal.factor:g}x {goal.peer}", *cells])
    return table([f"goals, {threads(run)}", *(case["name"] for case in cases)], rows) if rows else ""


def markdown(results: dict[str, Any]) -> str:
    """The table of the documentation: tokens a second of every system in every case, and ours against each peer."""
    host, cases = results["machine"], results["cases"]
    lines = [
        f"{host['cpu']}, {', '.join(host['extensions'])}; {results['model']}, median of {results['rounds']}. Tokens a "
        "second, in brackets how many times faster minilm_fast is in the same dtype.",
    ]
    for run in results["runs"]:
        head = [threads(run), *(case["name"] for case in cases)]
        lines += ["", _row(head), _row(["---"] * len(head))]
        for system in run["systems"]:
            cells = [_cell(run, system, case) for case in cases]
            name = f"**{label(system)}**" if system["name"] == OURS else label(system)
            lines.append(_row([name, *cells]))
        warning = disturbance(results, run)
        lines += ["", warning] if warning else []
    sizes = "; ".join(
        f"{c['name']}: {c['sequences']} sequences, {c['tokens']:,} tokens, {c['padded']:,} when padded" for c in cases
    )
    return "\n".join([*lines, "", f"{sizes}."])


def _cell(run: dict[str, Any], system: dict[str, Any], case: dict[str, Any]) -> str:
    rate = f"{case['tokens'] / _wall(system, case):,.0f}"
    ratio = reached(run, Goal(system["dtype"], label(system), 0.0), case)
    return rate if system["name"] == OURS or ratio is None else f"{rate} ({ratio:.2f}x)"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def check_docs(path: Path) -> tuple[str, str]:
    """What stands before and after the table of a Markdown file.

    Raises:
        UserError: the file is not there or has no place for the table.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--docs {path}: {error.strerror}") from None
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"--docs {path}: no lines {BEGIN!r} and {END!r} in it")
    return before + begin, end + after


def write_docs(results: dict[str, Any], path: Path) -> None:
    """Writes the table anew between its two marks."""
    before, after = check_docs(path)
    path.write_text(f"{before}\n\n{markdown(results)}\n\n{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Tables of a saved run of encoder.py")
    parser.add_argument("results", type=Path, help="what encoder.py wrote with --json")
    parser.add_argument("--docs", type=Path, metavar="PATH", help="Markdown file whose table to write anew")
    options = parser.parse_args()
    try:
        results = json.loads(options.results.read_text(encoding="utf-8"))
        print(text(results))
        if options.docs is not None:
            write_docs(results, options.docs)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {options.results}: not the results of a run of encoder.py ({error})", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
