"""What is measured is there: the files that benchmarks/results/README.md lists, and those that the docs name."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """Paths that git knows; where this is no checkout, those that are there."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        return set(listed.stdout.splitlines())
    return {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()}


def test_every_result_is_listed_and_every_listed_one_is_there(tracked: set[str]) -> None:
    readme = (RESULTS / "README.md").read_text(encoding="utf8")
    patterns = [
        name for row in re.findall(r"^\| (`.*?) \|", readme, re.MULTILINE) for name in re.findall("`(.*?)`", row)
    ]
    names = [Path(path).name for path in tracked if path.startswith("benchmarks/results/")]
    names.remove("README.md")
    assert len(patterns) >= 10
    found = {pattern: [name for name in names if _matches(name, pattern)] for pattern in patterns}
    assert [pattern for pattern, matches in found.items() if not matches] == []
    listed = {name for matches in found.values() for name in matches}
    assert sorted(set(names) - listed) == []


def _matches(name: str, pattern: str) -> bool:
    """``encoder.*`` is every ending of that one name, not ``encoder-other.txt``."""
    return name == pattern or (pattern.endswith(".*") and name.rsplit(".", 1)[0] == pattern.removesuffix(".*"))


def test_benchmark_files_that_the_docs_name_are_there(tracked: set[str]) -> None:
    named = {
        (page.relative_to(ROOT).as_posix(), name)
        for page in PAGES
        for name in re.findall(r"\bbenchmarks/[\w./-]+\.\w+", page.read_text(encoding="utf8"))
    }
    assert len(named) >= 20
    assert sorted(pair for pair in named if pair[1] not in tracked) == []
