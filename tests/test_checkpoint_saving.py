"""Saving checkpoints: round trips, exchange with plain transformers, and writes that fail midway."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minilm_fast import checkpoint, layouts
from minilm_fast.config import Config
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer

GOLDENS = Path(__file__).parent / "goldens"
LAYOUTS = json.loads((GOLDENS / "layouts" / "layouts.json").read_text())
DROPPED_ROW = "ignore:.*token-type row:UserWarning"


def golden_config(case):
    """The configuration that the original derived, for the family's own file."""
    config = Config.from_dict(case["hf_config"], model_type=case["model_type"])
    return config.replace(max_position_embeddings=case["seq2seq_config"]["max_position_embeddings"])


@pytest.mark.filterwarnings(DROPPED_ROW)
@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case["layout"])
def test_saving_round_trips(tmp_path, case):
    loaded = checkpoint.load(GOLDENS / case["file"], config=golden_config(case))
    checkpoint.save(tmp_path / "a", loaded.config, {**loaded.extra_state, **loaded.state})
    again = checkpoint.load(tmp_path / "a")
    for key in ("architectures", "torch_dtype"):
        again.config.extra.pop(key)
    assert again.config == loaded.config
    assert again.missing == loaded.missing
    assert again.state.keys() == loaded.state.keys()
    for name, tensor in loaded.state.items():
        assert torch.equal(again.state[name], tensor)
    for name, tensor in loaded.extra_state.items():
        if "embeddings" not in name:
            assert torch.equal(again.extra_state[name], tensor)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_bert_without_token_types_round_trips(tmp_path):
    loaded = checkpoint.load(GOLDENS / "tiny", config=GOLDENS / "tiny" / "config_type0.json")
    checkpoint.save(tmp_path / "a", loaded.config, loaded.state)
    assert load_file(tmp_path / "a" / "model.safetensors")[layouts.TOKEN_TYPE_EMBEDDINGS].count_nonzero() == 0
    again = checkpoint.load(tmp_path / "a")
    assert again.config.type_vocab_size == 0
    assert layouts.TOKEN_TYPE_EMBEDDINGS not in again.state


def transformers_models():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.5,
    }
    for name, extra in (
        ("Bert", {"max_position_embeddings": 20}),
        ("Roberta", {"max_position_embeddings": 22, "type_vocab_size": 1}),
        ("XLMRoberta", {"max_position_embeddings": 22, "type_vocab_size": 1}),
        ("Electra", {"max_position_embeddings": 20, "embedding_size": 8}),
        ("Electra", {"max_position_embeddings": 20, "embedding_size": 16}),
    ):
        for tied in (True, False):
            config = getattr(transformers, f"{name}Config")(**sizes, **extra, tie_word_embeddings=tied)
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}ForMaskedLM")(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.3)
            yield model


def logits(model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def test_exchange_with_plain_transformers(tmp_path):
    """A model of transformers, loaded and saved here, gives transformers the same logits; every family, tied or not."""
    from transformers import AutoModelForMaskedLM

    for number, model in enumerate(transformers_models()):
        model.save_pretrained(tmp_path / f"{number}-theirs")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = checkpoint.load(tmp_path / f"{number}-theirs", fold_token_types=True)
        assert not loaded.missing
        assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
        checkpoint.save(tmp_path / f"{number}-ours", loaded.config, loaded.state)
        ours, info = AutoModelForMaskedLM.from_pretrained(tmp_path / f"{number}-ours", output_loading_info=True)
        assert type(ours) is type(model)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        expected = logits(model)
        torch.testing.assert_close(logits(ours.eval()), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertModel"])
def test_model_of_the_original_in_plain_transformers(tmp_path, name):
    """What s2s-ft saved, saved again here, is a complete BertForMaskedLM; an encoder alone is a BertModel."""
    transformers = pytest.importorskip("transformers")
    loaded = checkpoint.load(GOLDENS / "tiny" / "pytorch_model.bin", config=GOLDENS / "tiny")
    state = dict(loaded.state)
    if name == "BertModel":
        state = {key: tensor for key, tensor in state.items() if key.startswith("bert.")}
    checkpoint.save(tmp_path / "a", loaded.config, state)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["architectures"] == [name]
    theirs = transformers.BertForMaskedLM.from_pretrained(GOLDENS / "tiny").eval()
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        if name == "BertForMaskedLM":
            ours = transformers.BertForMaskedLM.from_pretrained(tmp_path / "a").eval()
            assert torch.equal(ours(ids).logits, theirs(ids).logits)
        else:
            ours = transformers.BertModel.from_pretrained(tmp_path / "a", add_pooling_layer=False).eval()
            assert torch.equal(ours(ids).last_hidden_state, theirs.bert(ids).last_hidden_state)


def test_saved_tokenizer_is_recorded_and_checked(tmp_path):
    loaded = checkpoint.load(GOLDENS / "tiny")
    tokenizer = Tokenizer.from_pretrained(GOLDENS / "tiny" / "vocab.txt", do_lower_case=True)
    checkpoint.save(tmp_path / "a", loaded.config, loaded.state, tokenizer)
    again = checkpoint.load(tmp_path / "a")
    assert again.tokenizer_record == tokenizer.record()
    own = Tokenizer.from_pretrained(tmp_path / "a")
    assert own.do_lower_case
    assert own.record() == tokenizer.record()
    checkpoint.check_tokenizer(again.config, again.tokenizer_record, own)
    checkpoint.save(tmp_path / "b", again.config, again.state)
    assert checkpoint.load(tmp_path / "b").tokenizer_record == tokenizer.record()

    lines = (GOLDENS / "tiny" / "vocab.txt").read_text().splitlines()
    lines[-1], lines[-2] = lines[-2], lines[-1]
    (tmp_path / "swapped.txt").write_text("\n".join(lines) + "\n")
    swapped = Tokenizer.from_pretrained(tmp_path / "swapped.txt", do_lower_case=True)
    with pytest.raises(UserError, match=r"swapped\.txt: not the vocabulary that this checkpoint was saved with"):
        checkpoint.check_tokenizer(again.config, again.tokenizer_record, swapped)
    cased = Tokenizer.from_pretrained(GOLDENS / "tiny" / "vocab.txt", do_lower_case=False)
    with pytest.raises(UserError, match="with do_lower_case"):
        checkpoint.check_tokenizer(again.config, again.tokenizer_record, cased)
    with pytest.raises(UserError, match="another model's vocabulary"):
        checkpoint.save(tmp_path / "c", loaded.config.replace(vocab_size=390), truncated(loaded.state, 390), tokenizer)
    assert not (tmp_path / "c").exists()


def truncated(state, rows):
    cut = {name: t[:rows] if t.shape[0] == 400 else t for name, t in state.items()}
    cut[layouts.DECODER_WEIGHT] = cut[layouts.WORD_EMBEDDINGS]
    return cut


@pytest.mark.parametrize(
    ("tokens", "rows", "outcome"),
    [
        (400, 400, None),
        (401, 400, "401 tokens, but the checkpoint's embedding has 400 rows"),
        (400, 28996, "another model's vocabulary"),
        (399, 400, "warning"),
        (400, 401, "another model's vocabulary"),
        (30522, 30528, "warning"),
        (28996, 30522, "another model's vocabulary"),
        (250002, 250037, "warning"),
        (250002, 250038, "another model's vocabulary"),
    ],
)
def test_sizes_of_vocabulary_and_embedding(tokens, rows, outcome):
    tokenizer = Tokenizer.from_pretrained(GOLDENS / "tiny" / "vocab.txt")
    tokenizer.vocab_size = tokens
    config = Config.from_file(GOLDENS / "tiny").replace(vocab_size=rows)
    if outcome is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoint.check_tokenizer(config, None, tokenizer)
    elif outcome == "warning":
        with pytest.warns(UserWarning, match=f"the last {rows - tokens} rows"):
            checkpoint.check_tokenizer(config, None, tokenizer)
    else:
        with pytest.raises(UserError, match=outcome):
            checkpoint.check_tokenizer(config, None, tokenizer)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_saving_a_state_that_does_not_fit(tmp_path, change):
    loaded = checkpoint.load(GOLDENS / "tiny")
    state = dict(loaded.state)
    name = "bert.encoder.layer.1.output.dense.bias"
    if change == "missing":
        del state[name]
    else:
        state[name] = torch.zeros(7)
    with pytest.raises(UserError, match=name):
        checkpoint.save(tmp_path / "a", loaded.config, state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", [True, False])
def test_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, existing):
    loaded = checkpoint.load(GOLDENS / "tiny", for_training=True)
    target = tmp_path / "a"
    if existing:
        checkpoint.save(target, loaded.config, loaded.state)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_text = Path.write_text

    def full(path, *args, **kwargs):
        write_text(path, "half of it", encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    loaded.state[layouts.DECODER_BIAS].add_(1)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device") as error:
        checkpoint.save(target, loaded.config, loaded.state)
    assert str(target) in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert target.exists() == existing


def test_write_that_the_system_refuses_midway(tmp_path):
    """A real failing write: the process may not make files as large as the weights."""
    checkpoint_code = (
        "import resource, signal, sys\n"
        "from minilm_fast import checkpoint\n"
        "from minilm_fast.errors import UserError\n"
        f"loaded = checkpoint.load({str(GOLDENS / 'tiny')!r})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        f"    checkpoint.save({str(tmp_path / 'a')!r}, loaded.config, loaded.state)\n"
        "except UserError as error:\n"
        "    sys.exit(str(error))\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    checkpoint.save(tmp_path / "a", *old_checkpoint())
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    run = subprocess.run([sys.executable, "-c", checkpoint_code], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"{tmp_path / 'a'}: the checkpoint cannot be written: ")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("step", range(3))
def test_killed_while_saving(tmp_path, step, existing):
    """SIGKILL at each rename: what is there afterwards is a whole checkpoint, or none where there was none."""
    code = (
        "import os, signal, sys\n"
        "from minilm_fast import checkpoint\n"
        f"loaded = checkpoint.load({str(GOLDENS / 'tiny')!r}, for_training=True)\n"
        "loaded.state['cls.predictions.bias'].fill_(7)\n"
        "steps = 0\n"
        "def watch(rename):\n"
        "    def step(*args):\n"
        "        global steps\n"
        f"        if steps == {step}:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        steps += 1\n"
        "        rename(*args)\n"
        "    return step\n"
        "os.replace, os.rename = watch(os.replace), watch(os.rename)\n"
        f"checkpoint.save({str(tmp_path / 'a')!r}, loaded.config, loaded.state)\n"
    )
    old = checkpoint.load(GOLDENS / "tiny")
    if existing:
        checkpoint.save(tmp_path / "a", old.config, old.state)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True)
    renames = 2 if existing else 1
    assert run.returncode == (-signal.SIGKILL if step < renames else 0)
    if not existing and step == 0:
        assert not (tmp_path / "a").exists()
        return
    bias = checkpoint.load(tmp_path / "a").state[layouts.DECODER_BIAS]
    expected = torch.full_like(bias, 7) if step > 0 else old.state[layouts.DECODER_BIAS]
    assert torch.equal(bias, expected)


def old_checkpoint():
    loaded = checkpoint.load(GOLDENS / "tiny_relpos")
    return loaded.config, loaded.state


def test_saving_over_the_file_that_the_tensors_are_mapped_from(tmp_path):
    folder = shutil.copytree(GOLDENS / "tiny", tmp_path / "copy")
    loaded = checkpoint.load(folder)
    checkpoint.save(folder, loaded.config, loaded.state)
    again = checkpoint.load(folder)
    for name, tensor in checkpoint.load(GOLDENS / "tiny").state.items():
        assert torch.equal(again.state[name], tensor)
    assert (folder / "vocab.txt").exists()
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_saving_where_a_file_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save(tmp_path / "file" / "a", *old_checkpoint())
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save(tmp_path / "file", *old_checkpoint())


def test_saved_weights_have_the_mode_of_any_file(tmp_path):
    loaded = checkpoint.load(GOLDENS / "tiny")
    checkpoint.save(tmp_path / "saved", loaded.config, loaded.state)
    (tmp_path / "plain").touch()
    assert (tmp_path / "saved" / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
