"""A BERT of transformers with each attention implementation, on padded batches of mixed lengths.

python benchmarks/transformers_attention.py --threads 1 --rounds 7

The weights are random. Lengths are drawn evenly from 1/8 of ``--length`` to all of it; the batch is padded to the
longest. Rounds are interleaved, and what is printed is the median of the CPU-seconds of a round. The last row is this
package's own network with the same weights: it never computes what is at padding, where a model of transformers does
everywhere but in the attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAYERS, HIDDEN, HEADS, INNER, VOCABULARY = 6, 384, 12, 1536, 30522
IMPLEMENTATIONS = ("eager", "sdpa", "minilm_fast")


def make_batches(count: int, batch: int, length: int) -> list[dict[str, Any]]:
    """Padded batches on the right, the same at every call."""
    import torch

    torch.manual_seed(0)
    found = []
    for _ in range(count):
        lengths = torch.randint(max(1, length // 8), length + 1, (batch,))
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.randint(1000, VOCABULARY, mask.shape).masked_fill_(~mask, 0)
        found.append({"input_ids": ids, "attention_mask": mask.long()})
    return found


def make_models(attention_dropout: float) -> dict[str, Any]:
    """Equal models: transformers' with each implementation, and ours."""
    import transformers

    import minilm_fast

    minilm_fast.register_with_transformers()
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = transformers.BertConfig(
        **sizes, intermediate_size=INNER, num_labels=3, attention_probs_dropout_prob=attention_dropout
    )
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        transformers.BertForTokenClassification(config).save_pretrained(folder)
        for name in IMPLEMENTATIONS:
            models[f"transformers, {name}"] = transformers.BertForTokenClassification.from_pretrained(
                folder, attn_implementation=name
            )
        models["minilm_fast.TokenClassifier"] = minilm_fast.TokenClassifier.from_pretrained(folder)
    return models


def run(model: Any, inputs: dict[str, Any], train: bool) -> None:
    """Forward, or forward and backward of the tokens' mean square."""
    output = model(**inputs)
    logits = getattr(output, "logits", output)
    if train:
        logits[inputs["attention_mask"].bool()].float().square().mean().backward()
        model.zero_grad()


def measure(
    models: dict[str, Any], batches: list[dict[str, Any]], train: bool, rounds: int, dtype: Any
) -> dict[str, float]:
    """Median of each model's CPU-seconds for all batches."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            model.train(train)
            start = time.process_time()
            with torch.set_grad_enabled(train), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                for inputs in batches:
                    run(model, inputs, train)
            if number:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(medians: dict[str, float]) -> list[str]:
    """Rows of a Markdown table; the ratio is that of sdpa's time."""
    base = medians["transformers, sdpa"]
    return [f"| {name} | {value:.3f} | {base / value:.2f}x |" for name, value in medians.items()]


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, nargs="+", default=[128], help="longest of the drawn lengths")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], nargs="+", default=["fp32"], help="bf16: under autocast")
    parser.add_argument("--attention_dropout", type=float, default=0.1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    models = make_models(args.attention_dropout)
    results = []
    for length in args.length:
        batches = make_batches(args.batches, args.batch, length)
        share = sum(int(b["attention_mask"].sum()) for b in batches) / sum(b["attention_mask"].numel() for b in batches)
        for dtype in args.dtype:
            for step in ("forward", "forward and backward"):
                train = step != "forward"
                kind = torch.float32 if dtype == "fp32" else torch.bfloat16
                medians = measure(models, batches, train, args.rounds, kind)
                heading = f"{step}, {dtype}, batch {args.batch}, up to {length} tokens, {share:.0%} of the padded batch"
                print(f"\n{heading}\n\n| | CPU-seconds | of sdpa |\n|---|---|---|", *table(medians), sep="\n")
                results.append({"what": heading, "threads": args.threads, "cpu_seconds": medians})
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
