"""Config: validation with clear messages, and a round trip that loses nothing."""

import json
from pathlib import Path

import pytest

from minilm_fast.config import Config
from minilm_fast.errors import UserError

SIZES = {
    "vocab_size": 100,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def write(path, values):
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("name", ["config.json", "config_type0.json", "config_type45.json"])
def test_file_of_the_original(name):
    path = Path(__file__).parent / "goldens" / "tiny" / name
    raw = json.loads(path.read_text())
    config = Config.from_file(path)
    for key, value in raw.items():
        assert config.extra[key] == value if key == "architectures" else getattr(config, key) == value
    assert config.head_size == 12
    assert config.embedding_size == config.hidden_size


@pytest.mark.parametrize(
    "values",
    [
        SIZES,
        {**SIZES, "model_type": "minilm", "type_vocab_size": 0},
        {**SIZES, "model_type": "unilm", "type_vocab_size": 6, "rel_pos_bins": 32, "max_rel_pos": 128},
        {**SIZES, "model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1},
        {**SIZES, "model_type": "xlm-roberta", "pad_token_id": 1, "bos_token_id": 0},
        {**SIZES, "model_type": "electra", "embedding_size": 8, "summary_type": "first"},
        {**SIZES, "type_vocab_size": 6, "source_type_id": 4, "target_type_id": 5, "hidden_act": "relu"},
        {**SIZES, "task": {"nested": [1, None]}, "id2label": {"0": "A"}, "transformers_version": "2.10.0"},
    ],
)
def test_round_trip_loses_nothing(tmp_path, values):
    config = Config.from_dict(values)
    written = config.to_dict()
    for key, value in values.items():
        if key not in ("model_type", "type_vocab_size"):
            assert written[key] == value
    assert Config.from_dict(json.loads(json.dumps(written))) == config
    config.save(tmp_path)
    assert Config.from_file(tmp_path) == config == Config.from_file(tmp_path / "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_roberta_counts_usable_positions_and_has_no_token_types():
    config = Config.from_dict({**SIZES, "model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1})
    assert (config.max_position_embeddings, config.position_offset) == (512, 2)
    assert (config.type_vocab_size, config.pad_token_id) == (0, 1)
    assert (config.to_dict()["max_position_embeddings"], config.to_dict()["type_vocab_size"]) == (514, 1)


def test_plain_transformers_understands_names_of_its_own_only():
    assert Config.from_dict({**SIZES, "model_type": "minilm"}).to_dict()["model_type"] == "bert"
    assert Config.from_dict(SIZES, model_type="unilm").to_dict()["minilm_fast"] == {"model_type": "unilm"}


def test_aliases_and_nulls():
    assert Config.from_dict({**SIZES, "hidden_act": "swish"}).hidden_act == "silu"
    assert Config.from_dict({**SIZES, "hidden_act": "gelu_new"}).hidden_act == "gelu_new"
    assert Config.from_dict({**SIZES, "pad_token_id": None}).pad_token_id == 0
    assert Config.from_dict({**SIZES, "bos_token_id": None}).to_dict()["bos_token_id"] is None


def test_one_token_type_serves_both_segments():
    assert Config.from_dict({**SIZES, "type_vocab_size": 1}).target_type_id == 0


def test_replace_follows_the_hidden_size_and_validates():
    config = Config.from_dict(SIZES)
    assert config.replace(hidden_size=32).embedding_size == 32
    with pytest.raises(UserError, match="num_attention_heads"):
        config.replace(hidden_size=25)


def test_configurations_are_hashable_and_frozen():
    config = Config.from_dict({**SIZES, "task": {"a": 1}})
    assert len({config, Config.from_dict({**SIZES, "task": {"a": 1}})}) == 1
    with pytest.raises(AttributeError):
        config.hidden_size = 1


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"hidden_size": 25}, ["hidden_size 25", "num_attention_heads 4"]),
        ({"hidden_size": "24"}, ["hidden_size", "'24'"]),
        ({"hidden_size": 24.0}, ["hidden_size", "24.0"]),
        ({"hidden_size": True}, ["hidden_size", "True"]),
        ({"vocab_size": -1}, ["vocab_size", "-1"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "from 1 to 1000"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"intermediate_size": [4]}, ["intermediate_size", "[4]"]),
        ({"layer_norm_eps": 0}, ["layer_norm_eps"]),
        ({"layer_norm_eps": "1e-12"}, ["layer_norm_eps", "'1e-12'"]),
        ({"hidden_dropout_prob": 1.5}, ["hidden_dropout_prob", "1.5"]),
        ({"hidden_act": "tanhh"}, ["hidden_act", "tanhh", "gelu"]),
        ({"hidden_act": 3}, ["hidden_act", "3"]),
        ({"model_type": "gpt2"}, ["model_type", "gpt2"]),
        ({"model_type": 7}, ["model_type", "7"]),
        ({"embedding_size": 8}, ["embedding_size 8", "electra"]),
        ({"layer_norm_eps": float("inf")}, ["layer_norm_eps", "inf"]),
        ({"hidden_dropout_prob": float("nan")}, ["hidden_dropout_prob", "nan"]),
        ({"max_position_embeddings": 10**12}, ["max_position_embeddings", "1048576"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "1000"]),
        ({"rel_pos_bins": 32}, ["max_rel_pos"]),
        ({"pad_token_id": 100}, ["pad_token_id 100"]),
        ({"type_vocab_size": 2, "target_type_id": 2}, ["target_type_id 2", "type_vocab_size 2"]),
        ({"position_embedding_type": "relative_key"}, ["position_embedding_type", "relative_key"]),
        ({"minilm_fast": 3}, ["minilm_fast"]),
        ({"model_type": "roberta", "max_position_embeddings": 2}, ["max_position_embeddings"]),
    ],
)
def test_wrong_values_name_file_and_key(tmp_path, change, parts):
    path = write(tmp_path / "config.json", {**SIZES, **change})
    with pytest.raises(UserError) as error:
        Config.from_file(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("key", sorted(SIZES))
def test_missing_sizes_are_named(tmp_path, key):
    path = write(tmp_path / "config.json", {name: value for name, value in SIZES.items() if name != key})
    with pytest.raises(UserError, match=f"{key} is missing"):
        Config.from_file(path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"<!DOCTYPE html><html>not here</html>", "HTML"),
        (b'{"vocab_size": 100,\n"hidden_size": }', "line 2"),
        (b'{"vocab_size": 100', "not valid JSON"),
        (b"[1, 2]", "JSON object"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_files(tmp_path, content, part):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Config.from_file(path)
    assert str(path) in str(error.value)
    assert part in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Config.from_file(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        Config.from_file(tmp_path / "other.json")


def test_saving_where_nothing_can_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        Config.from_dict(SIZES).save(tmp_path / "absent" / "config.json")
