"""How much faster the MiniLM sizes are than BERT-Base: by matrix products, in torch, and in minilm_fast.

    python benchmarks/model_sizes.py --lengths 128,384,512 --batches 1,8,32 --threads 2

Encoders with random weights, from token ids to the last hidden states, all sequences of one length.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
from decode import _names, _positive, say
from harness import Series
from report import TOLERATED, table
from shapes import SHAPES, ModelShape
from work import encoder

from minilm_fast.errors import UserError

BASE = "bert-base"
MODELS = ("l12-h384", "l6-h384", "l6-h768")
CLAIMED = {"l12-h384": 2.7, "l6-h384": 5.3, "l6-h768": 2.0}
"""How many times faster than BERT-Base the models' authors state them to be."""
TORCH, OURS = "torch eager", "minilm_fast"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument(
        "--base", default=BASE, choices=sorted(SHAPES), help="the model that the others are compared to"
    )
    parser.add_argument("--models", default=",".join(MODELS), type=_names(sorted(SHAPES)), help="comma-separated")
    parser.add_argument("--lengths", default="128,384,512", type=_numbers, help="tokens a sequence")
    parser.add_argument("--batches", default="1,8,32", type=_numbers, help="sequences a batch")
    parser.add_argument("--systems", default=f"{TORCH},{OURS}", type=_names((TORCH, OURS)))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=_positive, default=2, help="on a CPU")
    parser.add_argument("--rounds", type=_positive, default=3, help="interleaved runs of each model")
    parser.add_argument("--settle", type=float, default=0.2, metavar="SECONDS", help="fewest seconds of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


Runner = Callable[[Any], Any]


def build(system: str, shape: ModelShape, options: argparse.Namespace) -> Runner:
    """A function from int64 ids ``[batch, length]`` to the last hidden states."""
    return _torch(shape, options) if system == TORCH else _ours(shape, options)


def _torch(shape: ModelShape, options: argparse.Namespace) -> Runner:
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(**_sizes(shape), attn_implementation="eager")
    model: Any = BertModel(config, add_pooling_layer=False).eval()
    model = model.to(options.device, {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype])

    def run(ids: Any) -> Any:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state

    return run


def _ours(shape: ModelShape, options: argparse.Namespace) -> Runner:
    import torch

    from minilm_fast import Config, Model
    from minilm_fast.modeling.packed_encoder import PackedEncoder, WeightReader
    from minilm_fast.ops import SequenceLayout

    model = Model.from_config(Config(**_sizes(shape)), seed=options.seed)
    encode = PackedEncoder(WeightReader(model.config, model.state, options.dtype, device=options.device))

    def run(ids: Any) -> Any:
        batch, length = ids.shape
        positions = torch.arange(length, dtype=torch.int32, device=ids.device).repeat(batch)
        layout = SequenceLayout.bidirectional([length] * batch, device=ids.device)
        return encode.hidden_states(ids.flatten().to(torch.int32), positions, layout)

    return run


def _sizes(shape: ModelShape) -> dict[str, int]:
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.positions,
    }


def timed(run: Runner, ids: Any, settle: float) -> dict[str, float]:
    """Seconds of one pass: the shortest of those that fit into ``settle`` seconds, at least one."""
    import torch

    def finish() -> None:
        if ids.device.type == "cuda":
            torch.cuda.synchronize()

    busy, cpu, start = machine.busy_seconds(), time.process_time(), time.perf_counter()
    walls: list[float] = []
    while not walls or time.perf_counter() - start < settle:
        begin = time.perf_counter()
        run(ids)
        finish()
        walls.append(time.perf_counter() - begin)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    others = max(0.0, machine.busy_seconds() - busy - cpu) / wall
    return {"wall": min(walls), "cpu": cpu / len(walls), "sequences": len(ids), "others": others}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All models in all systems, the rounds interleaved.

    Raises:
        UserError: the device is not there, or a length is beyond the table of positions.
    """
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: there is no GPU")
    names = list(dict.fromkeys([options.base, *options.models]))
    for length in options.lengths:
        if length > min(SHAPES[name].positions for name in names):
            raise UserError(f"--lengths {length}: the models have {min(SHAPES[n].positions for n in names)} positions")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    runners, left_out = _runners(names, options)
    series: dict[tuple[str, str, int, int], list[dict[str, float]]] = {}
    with torch.inference_mode():
        for length in options.lengths:
            for batch in options.batches:
                ids = torch.randint(5, min(SHAPES[name].vocab for name in names), (batch, length)).to(options.device)
                for run in runners.values():
                    run(ids)
                for _ in range(options.rounds):
                    for (system, name), run in runners.items():
                        found = timed(run, ids, options.settle)
                        series.setdefault((system, name, length, batch), []).append(found)
                say(f"length {length}, batch {batch}")
    device = machine.describe()["cpu"] if options.device == "cpu" else torch.cuda.get_device_name()
    return {
        "machine": machine.describe(),
        "device": device,
        "base": options.base,
        "dtype": options.dtype,
        "threads": options.threads,
        "rounds": options.rounds,
        "torch": torch.__version__,
        "shapes": {name: asdict(SHAPES[name]) for name in names},
        "runs": [
            {"system": s, "model": m, "length": length, "batch": batch, "runs": runs}
            for (s, m, length, batch), runs in series.items()
        ],
        "left_out": left_out,
    }


def _runners(names: list[str], options: argparse.Namespace) -> tuple[dict[tuple[str, str], Runner], dict[str, str]]:
    import torch

    runners: dict[tuple[str, str], Runner] = {}
    left_out = {}
    for system in options.systems:
        try:
            made = {(system, name): build(system, SHAPES[name], options) for name in names}
            with torch.inference_mode():
                for run in made.values():
                    run(torch.full((1, 8), 5, device=options.device))
        except (ImportError, RuntimeError, NotImplementedError) as error:
            if options.device == "cpu" and not isinstance(error, ImportError):
                raise
            left_out[system] = str(error).splitlines()[0]
            continue
        runners.update(made)
    if not runners:
        raise UserError("nothing could be measured: " + "; ".join(left_out.values()))
    return runners, left_out


def text(results: dict[str, Any]) -> str:
    """The table: speed relative to BERT-Base in the same system, and milliseconds of a batch."""
    series = {(r["system"], r["model"], r["length"], r["batch"]): Series(r["runs"]) for r in results["runs"]}
    systems = list(dict.fromkeys(key[0] for key in series))
    shapes = {name: ModelShape(**values) for name, values in results["shapes"].items()}
    base_name = results["base"]
    others = [name for name in shapes if name != base_name]
    rows = []
    for length, batch in dict.fromkeys(key[2:] for key in series):
        work = encoder(shapes[base_name], length)
        products = [f"{work / encoder(shapes[name], length):.2f}x" for name in others]
        rows.append([f"{length} x {batch}", "matrix products", *products, "", *[""] * len(others)])
        for system in systems:
            base = series[system, base_name, length, batch]
            measured = [series[system, name, length, batch] for name in others]
            rows.append(
                [
                    "",
                    system,
                    *(f"{base.ratio_to(one, 'wall'):.2f}x" for one in measured),
                    *(f"{1e3 * batch * one.median('wall'):,.2f}" for one in (base, *measured)),
                ]
            )
    header = ["length x batch", f"faster than {base_name} by"]
    header += [*others, *(f"ms {name}" for name in (base_name, *others))]
    claimed = ", ".join(f"{name} {CLAIMED[name]:g}x" for name in others if name in CLAIMED and base_name == BASE)
    heading = f"{results['device']}, {results['dtype']}, torch {results['torch']}, {results['rounds']} rounds"
    if results["device"] == results["machine"]["cpu"]:
        heading += f", {results['threads']} threads"
    parts = [heading, table(header, rows), _disturbance(results)]
    parts += [f"stated by the models' authors: {claimed}"] if claimed else []
    parts += [f"not measured: {name}: {why}" for name, why in results["left_out"].items()]
    return "\n\n".join(part for part in parts if part)


def _disturbance(results: dict[str, Any]) -> str:
    worst = max(run["others"] for entry in results["runs"] for run in entry["runs"])
    if results["device"] != results["machine"]["cpu"]:
        return ""
    if worst + results["threads"] <= results["machine"]["cores"] + TOLERATED:
        return ""
    return f"WARNING: other processes kept up to {worst:.1f} cores busy: do not quote these figures or ratios."


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        if options.json is not None and not options.json.resolve().parent.is_dir():
            raise UserError(f"{options.json}: there is no such folder")
        results = measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
