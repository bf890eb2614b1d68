"""How far the metrics are from the official programs: question generation under three poolings, and ROUGE-1.5.5.

    python benchmarks/metrics.py --gold qg/test.jsonl.xz --predictions qg_nqg_baseline_pred.test.jsonl.xz \
        --expected qg_expected_scores.json --rouge frank_rouge155_cases.jsonl.xz --meteor pycocoevalcap \
        --perl ROUGE-1.5.5

Predictions are JSON lines with ``pred``; the expected scores are those of pycocoevalcap 1.2 for the same file; each
case of ``--rouge`` has ``candidate``, ``reference`` and what the Perl script gave for the pair. ``--perl`` runs that
script on the same texts, one sentence a line; its folder ``data`` must hold an exception database that the installed
Perl can read (``buildExeptionDB.pl`` makes it).
"""

from __future__ import annotations

import argparse
import datetime
import json
import lzma
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report import table

from minilm_fast import metrics
from minilm_fast.data.examples import parse_record
from minilm_fast.errors import UserError
from minilm_fast.metrics.files import read_exceptions

if TYPE_CHECKING:
    import numpy as np

POOLINGS = {
    "sentence": ("sent_tok", "sentence_key"),
    "passage": ("src", "passage_answer_key"),
    "none": (None, "line_key"),
}
OFFICIAL = {"bleu4": "BLEU4", "meteor": "METEOR", "rougeL": "ROUGE_L"}
PARTS = ("precision", "recall", "f_score")
TOLERANCE = 1e-4
ROUNDING = 1e-5
"""The Perl script prints five digits."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """JSON lines, compressed with xz or not.

    Raises:
        UserError: the file cannot be read or a line is not a JSON object.
    """
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        lines = data.decode().rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return [parse_record(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def question_generation(options: argparse.Namespace) -> str:
    """Scores of one system's questions under each pooling, beside the official ones."""
    gold, predicted = read_records(options.gold), read_records(options.predictions)
    if [record["id"] for record in gold] != [record["id"] for record in predicted]:
        raise UserError(f"{options.predictions} and {options.gold} are not of the same examples")
    expected = json.loads(options.expected.read_text(encoding="utf-8"))["test"]
    predictions, references = [record["pred"] for record in predicted], [[record["ref_tok"]] for record in gold]
    rows, largest = [], 0.0
    for name, (field, official) in POOLINGS.items():
        keys = [record[field] for record in gold] if field else None
        found = metrics.question_generation(
            predictions, references, keys=keys, meteor_implementation=options.meteor or "none"
        )
        shared = [metric for metric in OFFICIAL if metric in found]
        differences = [found[metric] - expected[official][OFFICIAL[metric]] for metric in shared]
        largest = max(largest, *map(abs, differences))
        for metric, difference in zip(shared, differences, strict=True):
            there = expected[official][OFFICIAL[metric]]
            cells = (f"{found[metric]:.3f}", f"{there:.3f}", f"{difference:+.4f}")
            rows.append([name, str(int(found["items"])), OFFICIAL[metric], *cells])
    heading = (
        "Question generation, one system's output, references pooled three ways (keys as written, not lower-cased)"
    )
    header = ["pooling", "items", "metric", "ours", "pycocoevalcap", "difference"]
    return f"{heading}\n\n{table(header, rows)}\n\nlargest difference {largest:.4f}"


def rouge(options: argparse.Namespace) -> str:
    """Agreement with ROUGE-1.5.5, case by case, and what kinds of cases disagree."""
    import numpy as np

    cases = read_records(options.rouge)
    candidates, references = [case["candidate"] for case in cases], [[case["reference"]] for case in cases]
    official = np.array([[[case["rouge155"][f"rouge_{n}_{part}"] for part in PARTS] for n in "12l"] for case in cases])
    own = metrics.rouge_of_each(candidates, references)
    default = _default_rouge(candidates, references)
    names = sorted({case["dataset"] for case in cases})
    groups = {name: np.array([case["dataset"] == name for case in cases]) for name in names}
    rows = []
    for name, chosen in {**groups, "all": np.ones(len(cases), dtype=bool)}.items():
        for place, label in enumerate(("ROUGE-1", "ROUGE-2", "ROUGE-L")):
            truth = official[chosen, place, 2]
            cells = []
            for scores in (own, default):
                difference = scores[chosen, place, 2] - truth
                cells += [f"{np.mean(np.abs(difference) <= TOLERANCE):.2%}", f"{100 * np.mean(difference):+.4f}"]
            rows.append([name, str(int(chosen.sum())), label, f"{100 * truth.mean():.3f}", *cells])
    header = ["set", "cases", "F of", "Perl's mean", "ours equal", "mean diff.", "rouge-score equal", "mean diff."]
    heading = (
        f"ROUGE-1.5.5 (Perl), case by case: equal means within {TOLERANCE:g}; 'rouge-score' is that package with its "
        "own stemmer, ours has Perl's"
    )
    return f"{heading}\n\n{table(header, rows)}\n\n{_deviations(cases, own, official)}"


def _default_rouge(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    import numpy as np
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeLsum"]
    scorer = RougeScorer(names, use_stemmer=True)
    found = [scorer.score(texts[0], candidate) for candidate, texts in zip(candidates, references, strict=True)]
    return np.array([[scores[name] for name in names] for scores in found])


def _deviations(cases: Sequence[dict[str, Any]], own: np.ndarray, official: np.ndarray) -> str:
    """What kinds of deviations there are, and the largest ones with their texts."""
    import numpy as np

    difference = np.abs(own - official)
    apart = np.flatnonzero(difference[:, :, 2].max(axis=1) > TOLERANCE)
    precision, recall = (difference[apart, 0, part] <= ROUNDING for part in (0, 1))
    members: dict[str, list[int]] = {}
    for place, case in enumerate(cases):
        members.setdefault(case["reference"], []).append(place)
    found = set(apart.tolist())
    concerned = {cases[place]["reference"] for place in apart}
    whole = sum(found.issuperset(members[reference]) for reference in concerned)
    lines = [
        f"{len(apart)} cases deviate in some F:",
        f"  {int(np.sum(precision & ~recall))} in which ROUGE-1 precision is equal and recall is not: Perl counts "
        "other words in the reference, not other matches",
        f"  {int(np.sum(recall & ~precision))} the other way round",
        f"  {int(np.sum(~precision & ~recall))} in which both differ: other matches",
        f"  {int(np.sum(precision & recall))} in which ROUGE-1 is equal",
        f"They have {len(concerned)} different references; with {whole} of these every system's output deviates.",
        "Largest deviations of F:",
    ]
    for place in apart[np.argsort(-difference[apart, :, 2].max(axis=1))][:5]:
        scores = ", ".join(
            f"{label} {own[place, row, 2]:.5f} (Perl {official[place, row, 2]:.5f})" for row, label in enumerate("12L")
        )
        case = cases[place]
        lines += [f"  {case['dataset']}, {case['system']}: {scores}"]
        lines += [f"    output     {case['candidate'][:160]}", f"    reference  {case['reference'][:160]}"]
    return "\n".join(lines)


def perl(options: argparse.Namespace) -> str:
    """Agreement with the Perl script run now, on texts of several sentences, irregular words looked up as it does."""
    import numpy as np

    cases = read_records(options.rouge)
    candidates = [_sentences(case["candidate"]) for case in cases]
    references = [[_sentences(case["reference"])] for case in cases]
    official = _run_perl(options.perl, candidates, [texts[0] for texts in references])
    exceptions = read_exceptions(str(options.perl / "data" / "WordNet-2.0-Exceptions"))
    systems = {
        "ours, exceptions": metrics.rouge_of_each(candidates, references, exceptions=exceptions),
        "ours": metrics.rouge_of_each(candidates, references),
        "rouge-score": _default_rouge(candidates, references),
    }
    rows = []
    for name, scores in systems.items():
        difference = scores[:, :, 2] - official
        for place, label in enumerate(("ROUGE-1", "ROUGE-2", "ROUGE-L")):
            column = difference[:, place]
            cells = (f"{np.mean(np.abs(column) <= TOLERANCE):.2%}", f"{100 * column.mean():+.4f}")
            rows.append([name, label, f"{100 * official[:, place].mean():.3f}", *cells, f"{np.abs(column).max():.5f}"])
    header = ["", "F of", "Perl's mean", "equal", "mean diff.", "largest diff."]
    heading = f"ROUGE-1.5.5 run now with its exception database, {len(cases)} texts of several sentences"
    return f"{heading}\n\n{table(header, rows)}"


def _sentences(text: str) -> str:
    return text.replace(" . ", " .\n")


def _run_perl(folder: Path, candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """F of each pair, ``[pairs, 3]``.

    Raises:
        UserError: the script cannot be run.
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        # The script loads an XML parser, which lists of plain files do not need.
        (scratch / "XML").mkdir()
        (scratch / "XML" / "DOM.pm").write_text(
            "package XML::DOM; package XML::DOM::Parser; sub new { bless {}, shift } 1;"
        )
        pairs = []
        for place, texts in enumerate(zip(candidates, references, strict=True)):
            names = [scratch / f"{place}.{kind}" for kind in ("peer", "model")]
            for path, text in zip(names, texts, strict=True):
                path.write_text(text + "\n", encoding="utf-8")
            pairs.append(" ".join(map(str, names)))
        (scratch / "list").write_text("\n".join(pairs) + "\n")
        load = f'unshift @INC, "{scratch}"; do "{(folder / "ROUGE-1.5.5.pl").resolve()}" or die $@ || $!;'
        flags = ["-e", str(folder / "data"), "-c", "95", "-m", "-r", "1", "-n", "2", "-a", "-d", "-z", "SPL"]
        command = ["perl", "-e", load, "--", *flags, str(scratch / "list")]
        found = subprocess.run(command, capture_output=True, text=True, errors="replace")
    scores = re.findall(r"^X ROUGE-[12L] Eval [0-9]+\.X R:\S+ P:\S+ F:(\S+)", found.stdout, re.MULTILINE)
    if len(scores) != 3 * len(candidates):
        raise UserError(f"--perl {folder}: {(found.stderr.strip() or 'no scores').splitlines()[-1]}")
    return np.array(scores, dtype=np.float64).reshape(3, -1).T


def main() -> None:
    """Prints the comparisons that files are given for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--gold", type=Path, metavar="PATH", help="JSON lines with 'ref_tok', 'src', 'sent_tok', 'id'")
    add("--predictions", type=Path, metavar="PATH", help="JSON lines with 'pred' and 'id'")
    add("--expected", type=Path, metavar="PATH", help="their official scores")
    add("--rouge", type=Path, metavar="PATH", help="cases with the scores of ROUGE-1.5.5")
    add("--perl", type=Path, metavar="FOLDER", help="of ROUGE-1.5.5, to be run on the cases of --rouge")
    add("--meteor", choices=metrics.METEORS, help="METEOR too (needs Java)")
    options = parser.parse_args()
    questions = (options.gold, options.predictions, options.expected)
    if any(questions) and not all(questions):
        parser.error("--gold, --predictions and --expected belong together")
    if not any((*questions, options.rouge)):
        parser.error("give --gold, --predictions and --expected, or --rouge")
    if options.perl and not options.rouge:
        parser.error("--perl needs --rouge")
    packages = ", ".join(f"{name} {version(name)}" for name in ("rouge-score", "sacrebleu", "nltk"))
    print(f"{datetime.date.today()}  python {platform.python_version()}, {packages}")
    print(f"python benchmarks/metrics.py {shlex.join(_short(sys.argv[1:]))}")
    try:
        parts = [question_generation(options)] if options.gold else []
        parts += [rouge(options)] if options.rouge else []
        parts += [perl(options)] if options.perl else []
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print("\n" + "\n\n".join(parts))


def _short(argv: Sequence[str]) -> list[str]:
    return [Path(argument).name if Path(argument).exists() else argument for argument in argv]


if __name__ == "__main__":
    main()
