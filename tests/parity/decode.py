"""Compares decoding with what the original computed (``tests/goldens/decode``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from minilm_fast import ops
from minilm_fast.config import Config
from minilm_fast.decoding.options import SearchOptions
from minilm_fast.modeling.model import Model, PreparedSource, ignored_ids
from minilm_fast.ops import SequenceLayout
from tests.parity.outcome import GOLDENS, TOLERANCE, Outcome


def load_model(name: str, config_file: str = "config.json") -> Model:
    """The golden model ``tiny`` or ``tiny_relpos``, optionally under another configuration."""
    folder = GOLDENS / name
    return Model.from_pretrained(
        folder, config_name=str(folder / config_file), tokenizer_name=str(folder / "vocab.txt"), do_lower_case=True
    )


def sources() -> list[str | list[str]]:
    """The golden inputs: texts and token lists."""
    lines = (GOLDENS / "tiny" / "inputs.jsonl").read_text(encoding="utf8").split("\n")
    return [json.loads(line)["src"] for line in lines if line]


def groups() -> list[Path]:
    """The files that hold decoding cases."""
    found = []
    for path in sorted((GOLDENS / "decode").glob("*.json")):
        if "cases" in json.loads(path.read_text(encoding="utf8")):
            found.append(path)
    return found


def _options(case: dict[str, Any], **switches: Any) -> dict[str, Any]:
    args = case["args"]
    names = (
        "beam_size",
        "max_seq_length",
        "max_tgt_length",
        "length_penalty",
        "min_len",
        "batch_size",
        "forbid_duplicate_ngrams",
        "ngram_size",
        "forbid_ignore_word",
        "pos_shift",
    )
    options = {name: args[name] for name in names if name in args}
    return {**options, "mode": case["preprocess_mode"], "need_score_traces": "traces" in case, **switches}


def _model_of(group: dict[str, Any], case: dict[str, Any], cache: dict[tuple[str, str], Model]) -> Model:
    key = (group["model"], Path(case["args"].get("config_path", "config.json")).name)
    if key not in cache:
        cache[key] = load_model(*key)
    return cache[key]


def compare_group(path: Path, cache: dict[tuple[str, str], Model], device: str = "cpu", **switches: Any) -> Outcome:
    """Runs every case of a golden file.

    Args:
        cache: models by name, filled as needed.
        device: where to decode.
        **switches: search options that must not change an answer, such as ``early_exit`` or ``batch_size``.
    """
    group = json.loads(path.read_text(encoding="utf8"))
    inputs = sources()
    outcome = Outcome()
    for number, case in enumerate(group["cases"]):
        model = _model_of(group, case, cache)
        results = model.generate(inputs, device=device, **_options(case, **switches))
        for index, result in enumerate(results):
            name = f"{path.stem}[{number}] example {index}"
            if index in case["unsafe"]:
                continue
            expected = case["pred_ids"][index]
            if case["args"]["beam_size"] == 1:
                expected = expected[: len(result.ids)]
            outcome.check(result.ids == expected, f"{name}: ids {result.ids}, expected {expected}")
            outcome.check(result.text == case["lines"][index], f"{name}: text {result.text!r}")
            if case["args"]["beam_size"] > 1:
                error = abs(result.score - case["selected_score"][index])
                outcome.check(error <= TOLERANCE, f"{name}: score off by {error:.2e}")
            if "traces" in case:
                _compare_trace(outcome, name, result.trace, case["traces"][index])
    return outcome


def _compare_trace(outcome: Outcome, name: str, trace: Any, expected: dict[str, Any]) -> None:
    outcome.check(trace.last_frame == expected["last_frame"], f"{name}: last frame {trace.last_frame}")
    padded = trace.padded(expected["output_length"])
    outcome.check(
        all(len(padded[key]) == len(expected[key]) or len(padded[key]) == expected["output_length"] for key in padded),
        f"{name}: length of the trace",
    )
    frames = slice(0, expected["last_frame"] + 1)
    outcome.check(padded["wids"][frames] == expected["wids"][frames], f"{name}: ids of the trace")
    outcome.check(padded["ptrs"][frames] == expected["ptrs"][frames], f"{name}: pointers of the trace")
    ours, theirs = torch.tensor(padded["scores"][frames]), torch.tensor(expected["scores"][frames])
    error = float((ours - theirs).abs().max())
    outcome.check(error <= TOLERANCE, f"{name}: scores of the trace off by {error:.2e}")


def compare_first_step(cache: dict[tuple[str, str], Model], device: str = "cpu") -> Outcome:
    """Log-probabilities of the whole vocabulary in the first step."""
    outcome = Outcome()
    expected = load_file(GOLDENS / "decode" / "first_step_logprobs.safetensors")
    for name, golden in expected.items():
        pos_shift = name.endswith("posshift") or name.endswith("pos_shift")
        key = ("tiny_relpos" if "relpos" in name else "tiny", "config.json")
        if key not in cache:
            cache[key] = load_model(*key)
        model = cache[key]
        options = SearchOptions(max_seq_length=64, max_tgt_length=24, pos_shift=pos_shift)
        for index, source in enumerate(sources()):
            scores = _first_log_probabilities(model, source, options, device)
            error = float((scores - golden[index]).abs().max())
            outcome.check(error <= TOLERANCE, f"{name} example {index}: off by {error:.2e}")
    return outcome


def _first_log_probabilities(
    model: Model, source: str | Sequence[str], options: SearchOptions, device: str
) -> torch.Tensor:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    engine = model.engine(device=device)
    ids = PreparedSource(tokenizer, source, options).ids
    cache = engine.new_cache(slots=1, beams=1, source_capacity=len(ids), steps=2)
    query = tokenizer.sep_id if options.pos_shift else tokenizer.mask_id
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.inference_mode():
        hidden = engine.prefill([ids], query, slots, cache, keep_query=options.pos_shift)
        values, order = engine.predict(hidden, model.config.vocab_size)
    return torch.empty_like(values[0]).index_put_((order[0].long(),), values[0]).cpu()


def compare_ngrams(device: str = "cpu") -> Outcome:
    """The rule of repeated n-grams, and which ids a list of ignored words means."""
    outcome = Outcome()
    units = json.loads((GOLDENS / "decode" / "forbid_ngram_units.json").read_text(encoding="utf8"))
    for unit in units["dup_ngram_candidates"]:
        tokens = torch.tensor([unit["seq"]], dtype=torch.int32, device=device)
        lengths = torch.tensor([len(unit["seq"])], dtype=torch.int32, device=device)
        ignored = torch.tensor(unit["ignore_ids"] or [], dtype=torch.int32, device=device)
        banned = ops.ban_repeated_ngrams(tokens, lengths, unit["n"], ignored)
        found = sorted(int(token) for token in banned[0] if token >= 0)
        outcome.check(found == sorted(unit["forbidden_next_ids"]), f"n-gram unit {unit}: {found}")
    tokenizer = load_model("tiny").tokenizer
    assert tokenizer is not None
    for unit in units["forbid_ignore_word_to_ids"]:
        found = ignored_ids(tokenizer, unit["forbid_ignore_word"])
        outcome.check(found == sorted(unit["ids"]), f"ignored words {unit}: {found}")
    return outcome


def compare_preprocess() -> Outcome:
    """Ids, positions, token types and the mask of a source with its target rows."""
    outcome = Outcome()
    tokenizer = load_model("tiny").tokenizer
    assert tokenizer is not None
    cases = json.loads((GOLDENS / "decode_preprocess.json").read_text(encoding="utf8"))
    for number, case in enumerate(cases):
        target = case["max_tgt_length"]
        options = SearchOptions(
            max_seq_length=64, max_tgt_length=target, pos_shift=case["pos_shift"], mode=case["mode"]
        )
        ids = PreparedSource(tokenizer, case["tokens"], options).ids
        source, width = len(ids), len(case["input_ids"])
        real = [*range(source), *range(width, width + target)][: source + len(case["position_ids"]) - width]
        config = Config(
            vocab_size=400,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            source_type_id=case["source_type_id"],
            target_type_id=case["target_type_id"],
            type_vocab_size=8,
        )
        targets = len(real) - source
        types = [config.source_type_id] * source + [config.target_type_id] * targets
        outcome.check(case["input_ids"][:source] == ids, f"preprocess {number}: ids {ids}")
        outcome.check(not any(case["input_ids"][source:]), f"preprocess {number}: padding")
        outcome.check(
            [case["position_ids"][i] for i in real] == list(range(len(real))), f"preprocess {number}: positions"
        )
        outcome.check([case["segment_ids"][i] for i in real] == types, f"preprocess {number}: token types")
        rows = case["input_mask"].split("|")
        golden = torch.tensor([[int(rows[i][j]) for j in real] for i in real], dtype=torch.bool)
        layout = (
            SequenceLayout.causal([len(real)]) if case["mode"] == "l2r" else SequenceLayout.seq2seq([source], [targets])
        )
        outcome.check(bool((golden == layout.dense_mask()[0]).all()), f"preprocess {number}: mask")
    return outcome


def all_comparisons(device: str, **switches: Any) -> Iterator[tuple[str, Outcome]]:
    """Every golden of decoding: ``(name, outcome)``."""
    cache: dict[tuple[str, str], Model] = {}
    for path in groups():
        yield f"decode/{path.stem}", compare_group(path, cache, device, **switches)
    yield "decode/first_step_logprobs", compare_first_step(cache, device)
    yield "decode/forbid_ngram_units", compare_ngrams(device)
    yield "decode_preprocess", compare_preprocess()
