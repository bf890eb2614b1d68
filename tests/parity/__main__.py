"""``python -m tests.parity``: every comparison with the original's golden files, ``passed/total`` for each."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import torch

import minilm_fast
from minilm_fast.errors import UserError
from tests.parity import decode, files


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("--backend", choices=["reference", "cpu"], help="default: the best there is")
    parser.add_argument(
        "--device",
        default="cpu",
        help="where decoding computes: cpu (default), cuda, or simulated: a GPU that is simulated on the CPU",
    )
    parser.add_argument("--no-early-exit", action="store_true")
    parser.add_argument("--no-continuous-batching", action="store_true")
    parser.add_argument("--batch-size", type=int, help="default: the original's 7")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    switches = {
        "early_exit": not args.no_early_exit,
        "continuous_batching": not args.no_continuous_batching,
        **({"batch_size": args.batch_size} if args.batch_size else {}),
    }
    passed = total = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(minilm_fast.backend(args.backend))
        if args.device == "simulated":
            # Modules of the tests find one another beside themselves.
            sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
            from simulated_gpu import simulated_gpu

            stack.enter_context(simulated_gpu())
            args.device = "cuda"
        try:
            comparisons = list(decode.all_comparisons(args.device, **switches))
        except UserError as error:
            parser.error(str(error))
        comparisons += [
            ("trace", files.compare_traces()),
            ("tokenization", files.compare_tokenization()),
            ("layouts", files.compare_layouts()),
        ]
    for name, outcome in comparisons:
        print(f"{name:32s} {outcome.passed:6d}/{outcome.total}")
        for failure in outcome.failures[:5]:
            print(f"    {failure}")
        passed, total = passed + outcome.passed, total + outcome.total
    print(f"{passed} passed, {total - passed} failed")
    return 0 if passed == total else 1


if __name__ == "__main__":
    sys.exit(main())
