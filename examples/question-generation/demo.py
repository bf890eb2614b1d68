"""Turns real passages into questions with the checkpoint beside this file, and shows what came out and how fast.

python examples/question-generation/demo.py [--limit N] [--dtype fp32|bf16|int8]
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
WIDTH = 100


def read_examples(limit: int | None) -> list[dict[str, str]]:
    lines = (FOLDER / "passages.jsonl").read_text(encoding="utf8").split("\n")
    return [json.loads(line) for line in lines if line][:limit]


def indented(label: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"{label:10s}", subsequent_indent=" " * 10)


def show(example: dict[str, str], text: str, score: float) -> None:
    passage, _, answer = example["src"].rpartition(" [SEP] ")
    print(indented("passage", textwrap.shorten(passage, 400, placeholder=" ...")))
    print(indented("answer", answer))
    print(indented("question", text))
    print(indented("reference", example["tgt"]))
    print(f"{'score':10s}{score:.3f}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions from passages, with the checkpoint beside this script.")
    parser.add_argument("--limit", type=int, help="decode only the first N passages")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "int8"])
    args = parser.parse_args()

    import torch

    import minilm_fast

    examples = read_examples(args.limit)
    start = time.perf_counter()
    model = minilm_fast.Model.from_pretrained(FOLDER, do_lower_case=True)
    loaded = time.perf_counter()
    results = model.generate(
        [example["src"] for example in examples],
        dtype=args.dtype,
        beam_size=5,
        max_seq_length=512,
        max_tgt_length=48,
        batch_size=16,
        forbid_duplicate_ngrams=True,
        forbid_ignore_word=".",
    )
    seconds = time.perf_counter() - loaded
    for example, result in zip(examples, results, strict=True):
        show(example, result.text, result.score)
    tokens = sum(len(result.ids) for result in results)
    print(
        f"{len(examples)} passages, beam 5, {args.dtype}, {torch.get_num_threads()} threads: {seconds:.2f} s, "
        f"{len(examples) / seconds:.1f} passages/s, {tokens / seconds:.0f} tokens/s (loading {loaded - start:.2f} s)"
    )


if __name__ == "__main__":
    main()
