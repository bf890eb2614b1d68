"""The command line of fine-tuning: flags that cannot be, one line each; the choice of dev examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_files import RUN, arguments, copy_model

from minilm_fast import run_seq2seq
from minilm_fast.errors import UserError
from minilm_fast.training.checkpointing import RunFolder
from minilm_fast.training.history import History


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seed": 10**30}, "argument --seed: must be an integer of 64 bits"),
        ({"learning_rate": "nan"}, "argument --learning_rate: must be a positive number"),
        ({"max_source_seq_length": 2}, "--max_source_seq_length must be at least 3"),
        ({"max_target_seq_length": 1}, "--max_target_seq_length must be at least 2"),
        ({"label_smoothing": "nan"}, "--label_smoothing must be at least 0 and below 1"),
        ({"keep_prob": -0.1}, "--keep_prob must be between 0 and 1"),
        ({"keep_prob": 0.7, "random_prob": 0.6}, "--keep_prob 0.7 and --random_prob 0.6 are more than 1 together"),
        ({"target_mask_prob": "nan"}, "--target_mask_prob must be between 0 and 1"),
        ({"dev_file": None, "metric_for_best_model": "dev_loss"}, "--metric_for_best_model needs --dev_file"),
        ({"metric_for_best_model": "dev_bleu4"}, "without --dev_task only dev_loss is measured"),
        ({"bf16": True, "fp16": True}, "--fp16 and --bf16 exclude one another"),
    ],
)
def test_wrong_flags_are_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, object], message: str
) -> None:
    given = {**RUN, "dev_file": place / "train.jsonl", "output_dir": tmp_path / "out", **flags}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        status = run_seq2seq.main(arguments(place, place / "model", **given))
    except SystemExit as stop:
        status = stop.code
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and lines[-1].startswith("error: ") and message in lines[-1]
    assert not list((tmp_path / "out").glob("ckpt-*"))


@pytest.mark.parametrize(
    ("recorded", "given", "lower"), [(True, False, True), (False, False, False), (None, True, True)]
)
def test_case_of_the_vocabulary(
    tmp_path: Path, recorded: bool | None, given: bool, lower: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the checkpoint says, if it does: a cased tokenizer would find only ``[UNK]`` in an uncased vocabulary."""
    model = copy_model(tmp_path / "model")
    if recorded is not None:
        (model / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": recorded}))
    (tmp_path / "train.jsonl").write_text(json.dumps({"src": "GOTA", "tgt": "gota"}) + "\n")
    flags = arguments(tmp_path, model, **{**RUN, "num_training_steps": 1})
    if not given:
        flags.remove("--do_lower_case")
    assert run_seq2seq.main(flags) == 0
    assert ("0 of 2 tokens are unknown" in capsys.readouterr().err) == lower
    settings = json.loads((tmp_path / "out" / "ckpt-1" / "tokenizer_config.json").read_text())
    assert settings["do_lower_case"] is lower
    # What it has saved says what it needs, whatever the flag.
    flags[flags.index("--model_name_or_path") + 1] = str(tmp_path / "out" / "ckpt-1")
    flags[flags.index("--output_dir") + 1] = str(tmp_path / "next")
    assert run_seq2seq.main([flag for flag in flags if flag != "--do_lower_case"]) == 0


@pytest.mark.parametrize("most", [1, 7, 20, 39, 40, 100])
def test_dev_examples_are_spread_over_the_file(tmp_path: Path, most: int) -> None:
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps({"src": "a", "tgt": str(number)}) + "\n" for number in range(40)))
    required = ["--train_file=a", "--model_type=bert", "--model_name_or_path=b", "--output_dir=c"]
    args = run_seq2seq.build_parser().parse_args([*required, f"--dev_file={dev}", f"--max_dev_examples={most}"])
    chosen = [int(example.target) for example in run_seq2seq._dev_examples(args)]
    assert len(chosen) == min(most, 40) and chosen[0] == 0
    steps = {later - earlier for earlier, later in zip(chosen, [*chosen[1:], 40], strict=True)}
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run": 5}', '{"run": [1]}', "\xff"])
def test_a_run_that_cannot_be_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "ckpt-3").mkdir()
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"beside a run\.json that cannot be read"):
        RunFolder(tmp_path).claim({"seed": 1}, overwrite=False)


@pytest.mark.parametrize("records", ["5", "[5]", '[{"step": "x"}]', '[{"step": 1, "dev_loss": "low"}]', "[{}]", "null"])
def test_a_history_that_cannot_be_read_counts_as_empty(tmp_path: Path, records: str) -> None:
    path = tmp_path / "history.json"
    path.write_text(f'{{"records": {records}}}')
    history = History(path, "dev_loss")
    history.load(3)
    assert history.records == [] and history.best() is None
    history.add({"step": 3, "dev_loss": 2.0})
    assert json.loads(path.read_text())["best"] == {"step": 3, "metric": "dev_loss", "value": 2.0}
