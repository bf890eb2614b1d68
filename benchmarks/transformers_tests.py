"""transformers' own model tests with the attention implementation of this project as the default.

Needs a checkout of transformers at the tag of the version to test (its wheel has no tests), and the package
``parameterized``:

    git clone --depth 1 --branch v5.15.0 https://github.com/huggingface/transformers checkout
    python benchmarks/transformers_tests.py --checkout checkout

The attention of this project takes the name ``sdpa``, which is what a model gets that names none: tests that compare
eager with sdpa then compare eager with this project, and whatever is left to transformers' own sdpa still goes there.
``--implementation sdpa`` changes nothing, which tells failures of the environment from ours.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
from pathlib import Path
from typing import Any

FAMILIES = ("bert", "roberta", "xlm_roberta", "electra")


class Counting:
    """Pytest plugin: counts outcomes by kind, and keeps why tests were skipped or failed."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.skipped: collections.Counter[str] = collections.Counter()
        self.failed: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for each phase of a test."""
        if report.when != "call" and report.outcome == "passed":
            return
        # A test with sub-tests reports several times; one that failed has failed.
        if self.outcomes.get(report.nodeid) != "failed":
            self.outcomes[report.nodeid] = report.outcome
        if report.outcome == "skipped":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped[reason.removeprefix("Skipped: ")] += 1
        elif report.outcome == "failed":
            self.failed[report.nodeid] = str(report.longrepr).strip().splitlines()[-1][:300]


def use_ours() -> collections.Counter[str]:
    """Puts this project's attention in the place of sdpa; counts how often it computes and how often it does not."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    import minilm_fast.integrations.transformers as integration

    calls: collections.Counter[str] = collections.Counter()
    attend, fall_back = integration.ops.padded_attention, integration._fall_back

    def attended(*args: Any, **kwargs: Any) -> Any:
        calls["own"] += 1
        return attend(*args, **kwargs)

    def fell_back(*args: Any, **kwargs: Any) -> Any:
        calls["fall-back"] += 1
        return fall_back(*args, **kwargs)

    integration.ops.padded_attention = attended
    integration._fall_back = fell_back
    AttentionInterface.register("sdpa", integration.attention)
    AttentionMaskInterface.register("sdpa", integration.attention_mask)
    return calls


def main() -> int:
    """Runs the tests; the exit status is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of transformers' repository")
    parser.add_argument("--families", nargs="+", default=["bert"], choices=FAMILIES)
    parser.add_argument("--implementation", default="minilm_fast", choices=["minilm_fast", "sdpa"])
    parser.add_argument("--select", default="", help="pytest's -k")
    parser.add_argument("--output", type=Path, help="write the counts as JSON")
    args = parser.parse_args()
    files = [f"tests/models/{name}/test_modeling_{name}.py" for name in args.families]
    for file in files:
        if not (args.checkout / file).is_file():
            parser.error(f"{args.checkout / file}: no such file; --checkout must be a checkout of transformers")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(args.checkout)
    sys.path.insert(0, str(Path.cwd()))
    sys.path.insert(0, str(Path.cwd() / "src"))
    import pytest
    import torch
    import transformers

    torch.set_num_threads(1)
    calls = use_ours() if args.implementation == "minilm_fast" else collections.Counter()
    counting = Counting()
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", "-W", "ignore"]
    if args.select:
        options += ["-k", args.select]
    status = pytest.main([*options, *files], plugins=[counting])
    result = {
        "transformers": transformers.__version__,
        "implementation": args.implementation,
        "families": args.families,
        **collections.Counter(counting.outcomes.values()),
        "calls": dict(calls),
        "why skipped": dict(counting.skipped.most_common()),
        "failures": counting.failed,
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
