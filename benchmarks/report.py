"""Tables and plots of what ``decode.py`` measured.

    python benchmarks/report.py results.json --plot figure.png

prints the tables of a saved run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import Series
from shapes import DecodeWorkload, ModelShape
from work import Work, encoder_decoder, masked_query_decoder

OURS = "minilm_fast"
MASKED_QUERY = (OURS, "original")
TOLERATED = 0.3
"""Cores beyond the free ones that other processes may use before the figures are called disturbed."""
RATED = {
    "source: linear": ("source_linear", "linear"),
    "source: attention": ("source_attention", "attention"),
    "step: linear": ("step_linear", "linear"),
    "step: decode_attention": ("step_attention", "attention"),
    "vocabulary: lm_head_topk": ("vocabulary", "linear"),
}
"""Rows of the breakdown whose operations are counted: the field of ``Work`` and the kind of product."""
NOTE = (
    "cpu-s: CPU-seconds of all threads together; one second on the clock with two busy cores is two cpu-s. Medians "
    "over the rounds, smallest and largest in brackets. Of the limit: what the task's products would take at the "
    "measured peak of their dtype, over what the run took (CPU-seconds for both). Others: cores that other processes "
    "kept busy during the runs."
)
COUSIN = (
    "hf and ctranslate2 run the size-matched BART cousin (as many encoder and decoder layers, same width, random "
    "weights), another model of about the same work; none of them can run the measured one."
)


def text(results: dict[str, Any]) -> str:
    """All tables."""
    parts = [_heading(results), _systems(results), disturbance(results), _ratios(results), _alone(results)]
    parts.append(_breakdowns(results))
    if results["left_out"]:
        parts.append("\n".join(f"not measured: {name}: {why}" for name, why in results["left_out"].items()))
    parts += [NOTE, COUSIN]
    return "\n\n".join(part for part in parts if part)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns separated by two spaces: the first to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def _work(results: dict[str, Any], system: str) -> Work:
    shape, load = ModelShape(**results["shape"]), DecodeWorkload(**results["workload"])
    return masked_query_decoder(shape, load) if system in MASKED_QUERY else encoder_decoder(shape, load)


def _dtype(system: dict[str, Any], kind: str) -> str:
    """The dtype in which a system makes products of that kind: only weights are int8 anywhere, and attention stays
    fp32 except for a model that is bf16 throughout."""
    dtype: str = system["dtype"]
    return dtype if kind == "linear" or system["name"] == "hf" else "fp32"


def _limit(results: dict[str, Any], system: dict[str, Any]) -> float:
    """CPU-seconds a sequence at the measured peak."""
    work, peak = _work(results, system["name"]), results["peak_operations_per_second"]
    return sum(getattr(work, kind) / peak[_dtype(system, kind)]["cpu"] for kind in ("linear", "attention"))


def _label(system: dict[str, Any]) -> str:
    return f"{system['name']} {system['dtype']}"


def _heading(results: dict[str, Any]) -> str:
    host, shape, load = results["machine"], results["shape"], results["workload"]
    rates = ", ".join(
        f"{dtype} {peak['wall'] / 1e9:,.0f} ({peak['cpu'] / 1e9:,.0f} a cpu-s)"
        for dtype, peak in results["peak_operations_per_second"].items()
    )
    blocking = f"{load['ngram']}-gram blocking" if load["ngram"] else "no n-gram blocking"
    lines = [
        f"{host['cpu']}, {host['cores']} cores ({', '.join(host['extensions'])}), {results['threads']} threads",
        f"measured peak of large products, Gop/s: {rates}",
        f"{shape['name']}: batch {load['batch']}, beam {load['beam']}, source {load['source']}, {load['steps']} forced "
        f"steps, {blocking}, random weights; Gop a sequence: {_work(results, OURS).total / 1e9:.1f}, "
        f"cousin {_work(results, 'hf').total / 1e9:.1f}",
    ]
    lines += [f"{_label(s)}: {s['version']}; {s['settings']}" for s in results["systems"]]
    return "\n".join(lines)


def _systems(results: dict[str, Any]) -> str:
    rows = []
    for system in results["systems"]:
        series = Series(system["batch"])
        cpu, wall = series.median("cpu"), series.median("wall")
        low, high = series.spread("cpu")
        rows.append(
            [
                _label(system),
                f"{cpu:.3f} ({low:.3f}-{high:.3f})",
                f"{wall:.3f}",
                f"{1e3 * cpu * results['workload']['batch'] / results['workload']['steps']:,.0f}",
                f"{sum(run['steps'] for run in series.runs)}",
                f"{100 * _limit(results, system) / cpu:.0f}%",
                f"{system['memory'] / 1e6:,.0f}",
                f"{sum(run['others'] for run in series.runs) / len(series.runs):.1f}",
            ]
        )
    header = ["a sequence", "cpu-s", "wall s", "cpu-ms a step", "steps measured", "of the limit", "peak MB", "others"]
    return table(header, rows)


def disturbance(results: dict[str, Any]) -> str:
    """A warning if other processes took cores that the measured threads needed; else an empty text."""
    runs = [run for system in results["systems"] for run in system["batch"] + system["alone"]]
    worst = max((run["others"] for run in runs), default=0.0)
    if worst + results["threads"] <= results["machine"]["cores"] + TOLERATED:
        return ""
    return (
        f"WARNING: other processes kept up to {worst:.1f} cores busy. Threads that wait for a partner without a core "
        "spin, which inflates cpu-s many times over where products are small: do not quote these figures or ratios."
    )


def _ratios(results: dict[str, Any]) -> str:
    ours = [system for system in results["systems"] if system["name"] == OURS]
    others = [system for system in results["systems"] if system["name"] != OURS]
    if not ours or not others:
        return ""
    rows = [
        [
            _label(mine),
            *(
                f"{Series(peer['batch']).ratio_to(Series(mine['batch']), 'cpu'):.2f}x "
                f"({Series(peer['batch']).ratio_to(Series(mine['batch']), 'wall'):.2f}x)"
                for peer in others
            ),
        ]
        for mine in ours
    ]
    return table(["times faster by cpu-s (by wall) than", *map(_label, others)], rows)


def _alone(results: dict[str, Any]) -> str:
    rows = []
    for system in results["systems"]:
        if system["alone"]:
            series = Series(system["alone"])
            low, high = series.spread("wall")
            what = "text to text" if system["name"] == OURS else "ids to ids"
            rows.append(
                [
                    _label(system),
                    what,
                    f"{series.median('wall'):.3f} ({low:.3f}-{high:.3f})",
                    f"{series.median('cpu'):.3f}",
                ]
            )
    return table(["one sequence alone", "", "wall s", "cpu-s"], rows) if rows else ""


def _breakdowns(results: dict[str, Any]) -> str:
    return "\n\n".join(_breakdown(results, system) for system in results["systems"] if system["breakdown"])


def _breakdown(results: dict[str, Any], system: dict[str, Any]) -> str:
    """Where the time of one batch goes, on the clock of the calling thread."""
    seconds: dict[str, float] = system["breakdown"]
    total, load = sum(seconds.values()), results["workload"]
    work, peak = _work(results, system["name"]), results["peak_operations_per_second"]
    rows = []
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        rate = share = ""
        if name in RATED:
            part, kind = RATED[name]
            achieved = getattr(work, part) * load["batch"] / spent
            rate, share = f"{achieved / 1e9:,.0f}", f"{100 * achieved / peak[_dtype(system, kind)]['wall']:.0f}%"
        per_step = "" if name.startswith("source") else f"{1e3 * spent / load['steps']:.2f}"
        rows.append([name, f"{1e3 * spent:,.0f}", per_step, f"{100 * spent / total:.1f}%", rate, share])
    rows.append(["all", f"{1e3 * total:,.0f}", "", "100.0%", "", ""])
    return table([f"{_label(system)}, one batch", "wall ms", "ms/step", "share", "Gop/s", "of peak"], rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of CPU-seconds a sequence, and the breakdown of each of our dtypes, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    broken = [system for system in results["systems"] if system["breakdown"]]
    figure, axes = pyplot.subplots(1, 2 if broken else 1, figsize=(13 if broken else 7, 4.5), squeeze=False)
    _plot_systems(axes[0][0], results)
    if broken:
        _plot_breakdowns(axes[0][1], broken)
    shape, load = results["shape"], results["workload"]
    figure.suptitle(
        f"{shape['name']}, batch {load['batch']}, beam {load['beam']}, source {load['source']}, {load['steps']} steps, "
        f"{results['threads']} threads"
    )
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=150)
    pyplot.close(figure)


def _plot_systems(axis: Any, results: dict[str, Any]) -> None:
    systems = results["systems"][::-1]
    values = [Series(system["batch"]).median("cpu") for system in systems]
    colours = ["tab:blue" if system["name"] == OURS else "tab:gray" for system in systems]
    bars = axis.barh([_label(system) for system in systems], values, color=colours)
    axis.bar_label(bars, labels=[f"{value:.3g}" for value in values], padding=3)
    axis.set_xlabel("CPU-seconds a sequence, less is better")
    axis.margins(x=0.15)


def _plot_breakdowns(axis: Any, systems: list[dict[str, Any]]) -> None:
    largest = max(sum(system["breakdown"].values()) for system in systems)
    names = sorted({name for system in systems for name in system["breakdown"]})
    visible = [name for name in names if max(s["breakdown"].get(name, 0.0) for s in systems) > 0.01 * largest]
    labels = [system["dtype"] for system in systems]
    bottom = [0.0] * len(systems)
    stacks = [(name, [system["breakdown"].get(name, 0.0) for system in systems]) for name in visible]
    rest = [sum(s["breakdown"].values()) - sum(s["breakdown"].get(n, 0.0) for n in visible) for s in systems]
    for name, values in [*stacks, ("everything else", rest)]:
        axis.bar(labels, values, bottom=bottom, label=name)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axis.set_ylim(0, 1.05 * largest)
    axis.set_ylabel(f"wall seconds of one batch, {OURS}")
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def main() -> int:
    parser = argparse.ArgumentParser(description="Tables and plot of a saved run of decode.py")
    parser.add_argument("results", type=Path, help="what decode.py wrote with --json")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a PNG")
    options = parser.parse_args()
    try:
        results = json.loads(options.results.read_text(encoding="utf-8"))
        print(text(results))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {options.results}: not the results of a run of decode.py ({error})", file=sys.stderr)
        return 2
    if options.plot is not None:
        plot(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
