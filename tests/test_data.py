"""Reading, masking and batching of training data."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minilm_fast.data import examples
from minilm_fast.data.batching import collate
from minilm_fast.data.examples import Example, read_examples
from minilm_fast.data.features import make_features, read_features, special_ids
from minilm_fast.data.masking import Feature, Masking, Sample, make_masker
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer

GOLDENS = Path(__file__).parent / "goldens"


def _write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(GOLDENS / "tiny" / "vocab.txt", do_lower_case=True)


LINES = (
    '{"src": "a b", "tgt": "c", "id": 1}',
    "",
    '{"src": [], "tgt": ["x", "##y"]}',
    '{"src": "line\\u2028separator", "tgt": "kept\u2028whole"}',
)
EXAMPLES = [
    Example("a b", "c"),
    Example([], ["x", "##y"]),
    Example("line\u2028separator", "kept\u2028whole"),
]


def test_reads_texts_tokens_and_blank_lines(tmp_path: Path) -> None:
    assert list(read_examples(_write(tmp_path / "a.jsonl", *LINES))) == EXAMPLES


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bytes], ids=["gzip", "xz", "plain"])
def test_reads_compressed_files_whatever_their_names(tmp_path: Path, name: str, compress: Callable) -> None:
    plain = _write(tmp_path / "plain", *LINES)
    (tmp_path / name).write_bytes(compress(plain.read_bytes()))
    assert list(read_examples(tmp_path / name)) == EXAMPLES


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress], ids=["gzip", "xz"])
def test_compressed_file_that_is_cut_off_or_damaged(tmp_path: Path, compress: Callable) -> None:
    rng = random.Random(0)
    lines = [json.dumps({"src": str(rng.random()), "tgt": "a"}) for _ in range(2000)]
    whole = compress("\n".join(lines).encode())
    path = tmp_path / "a.jsonl"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut off"):
        list(read_examples(path))
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.jsonl.*(damaged|broken JSON|CRC|cut off|NUL|UTF-8)"):
        list(read_examples(path))


def test_crlf_and_byte_order_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = b'\xef\xbb\xbf{"src": "a", "tgt": "b"}\r\n'
    path.write_bytes(line + b"\r\n" + line + b"\xef\xbb\xbf\r\n" + line.strip())
    assert list(read_examples(path)) == [Example("a", "b")] * 3


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", '{"src": "a\\ud800b", "tgt": "\\ud83d\\ude00"}')
    assert list(read_examples(path)) == [Example("a\ufffdb", "\U0001f600")]


def test_long_line(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "a.jsonl", json.dumps({"src": "the " * 300_000, "tgt": "the"}))
    assert read_features(path, tokenizer).lengths()[0].tolist() == [300_000]
    monkeypatch.setattr(examples, "LONGEST_LINE", 1 << 20)
    with pytest.raises(UserError, match=r"a\.jsonl:1: a line of more than 1 MiB"):
        list(read_examples(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"src": "a", "tgt": ', "broken JSON"),
        ('{"tgt": "a"}', "no 'src'"),
        ('{"src": "a"}', "no 'tgt'"),
        ('["a", "b"]', "not a JSON object"),
        ('{"src": 3, "tgt": "a"}', "'src' is neither"),
        ('{"src": null, "tgt": "a"}', "'src' is neither"),
        ('{"src": ["a", 1], "tgt": ["a"]}', "'src' is neither"),
        ('{"src": ["a"], "tgt": "a"}', "both"),
        ('{"src": "a", "tgt": "  "}', "'tgt' is empty"),
        ('{"src": ["a"], "tgt": []}', "'tgt' is empty"),
        ('{"src": "a", "tgt": "b"}\0\0', "NUL bytes"),
        ('{"src": "a", "tgt": "b"}{"src": "a", "tgt": "b"}', "broken JSON"),
        ('{"src": "a", "tgt": ' + "[" * 100_000, "broken JSON"),
    ],
    ids=range(13),
)
def test_wrong_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = _write(tmp_path / "a.jsonl", '{"src": "a", "tgt": "b"}', "", line)
    with pytest.raises(UserError, match=message) as caught:
        list(read_examples(path))
    assert str(caught.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_target_without_tokens_is_named_by_its_line(tmp_path: Path, tokenizer: Tokenizer, num_proc: int) -> None:
    path = _write(tmp_path / "a.jsonl", '{"src": "a", "tgt": "b"}', "", '{"src": "a", "tgt": "\u200b\\u0007"}')
    with pytest.raises(UserError, match=r"a\.jsonl:3: 'tgt' is empty: nothing is left"):
        read_features(path, tokenizer, num_proc)


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xef\xbb\xbf\r\n"])
def test_file_without_examples(tmp_path: Path, tokenizer: Tokenizer, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds no examples"):
        list(read_examples(path))
    with pytest.raises(UserError, match="holds no examples"):
        read_features(path, tokenizer)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        list(read_examples(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="cannot read"):
        list(read_examples(tmp_path))
    for content in (b"\xff\xfe\x00", "{}".encode("utf-16"), b'{"src": "\xe4"}\n'):
        (tmp_path / "binary").write_bytes(content)
        with pytest.raises(UserError, match=r"binary:1: .*not UTF-8"):
            list(read_examples(tmp_path / "binary"))


def test_features_are_those_of_the_original(tmp_path: Path, tokenizer: Tokenizer) -> None:
    expected = json.loads((GOLDENS / "train" / "dataset.json").read_text())["features"]
    inputs = (GOLDENS / "tiny" / "inputs.jsonl").read_text().splitlines()
    assert len(inputs) == len(expected) == 26
    compared = 0
    for line, feature in zip(inputs, expected, strict=True):
        record = json.loads(line)
        if not record["tgt"]:
            continue
        path = _write(tmp_path / "a.jsonl", line)
        assert list(read_features(path, tokenizer)) == [Feature(**feature)]
        compared += 1
    assert compared > 20


def _many(tmp_path: Path, count: int) -> tuple[Path, list[Example]]:
    rng = random.Random(count)
    words = ["the", "ab", "c", "!", "zq"]
    found = [
        Example(" ".join(rng.choices(words, k=rng.randrange(9))), " ".join(rng.choices(words, k=rng.randint(1, 4))))
        for _ in range(count)
    ]
    lines = (json.dumps({"src": example.source, "tgt": example.target}) for example in found)
    return _write(tmp_path / "many.jsonl", *lines), found


def test_store_gives_every_feature_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, found = _many(tmp_path, 5000)
    expected = make_features(found, tokenizer)
    store = read_features(path, tokenizer)
    assert len(store) == 5000
    assert list(store) == [store[i] for i in range(5000)] == expected
    assert store[-1] == expected[-1] and store[-5000] == expected[0]
    assert type(store[2].source_ids) is list and all(type(token) is int for token in store[2].target_ids)
    assert any(not feature.source_ids for feature in store)
    for index in (5000, -5001):
        with pytest.raises(IndexError):
            store[index]
    source, target = store.lengths()
    assert source.tolist() == [len(feature.source_ids) for feature in expected]
    assert target.tolist() == [len(feature.target_ids) for feature in expected]
    assert store.counts.tokens == source.sum() + target.sum()


def test_selected_features_are_a_view(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, found = _many(tmp_path, 3000)
    store, expected = read_features(path, tokenizer), make_features(found, tokenizer)
    order = random.Random(0).sample(range(3000), 3000)
    shuffled = store.select(order)
    assert list(shuffled) == [expected[i] for i in order]
    assert list(shuffled[10:2900:7]) == [expected[i] for i in order[10:2900:7]]
    assert shuffled.lengths()[0].tolist() == [len(expected[i].source_ids) for i in order]
    assert len(store.select([])) == 0 and list(store.select([])) == []


def test_parallel_tokenisation_gives_the_same_in_the_same_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, found = _many(tmp_path, 9000)
    store = read_features(path, tokenizer, num_proc=2)
    assert list(store) == make_features(found, tokenizer)
    assert store.counts == read_features(path, tokenizer).counts


class _EndsItsProcess:
    """What a worker becomes that unpickles it."""

    def __reduce__(self) -> tuple:
        return os._exit, (1,)


def test_worker_that_dies_is_an_error(tmp_path: Path) -> None:
    path, _ = _many(tmp_path, 10)
    with pytest.raises(UserError, match=r"many\.jsonl: a process that tokenised it ended"):
        read_features(path, _EndsItsProcess(), num_proc=2)


TOKENISE_FOR_EVER = """
import itertools, sys
from minilm_fast.data.features import _TokeniseLines
from minilm_fast.data.parallel import ordered_map
from minilm_fast.tokenization import Tokenizer
if __name__ == "__main__":
    lines = [(1, b'{"src": "the", "tgt": "the"}')]
    tokenizer = Tokenizer.from_pretrained(sys.argv[1])
    for chunk in ordered_map(_TokeniseLines("-", tokenizer), itertools.repeat(lines), 2, "-"):
        print("working", flush=True)
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TOKENISE_FOR_EVER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(GOLDENS / "tiny" / "vocab.txt")],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=environment,
    )
    assert parent.stdout is not None and parent.stdout.readline() == b"working\n"
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(parent.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(parent.pid, signal.SIGKILL)
    pytest.fail("workers were left behind")


def test_tokens_that_the_vocabulary_lacks_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = _write(tmp_path / "a.jsonl", '{"src": ["the", "nowhere"], "tgt": ["the"]}', '{"src": "", "tgt": "\u9f98"}')
    counts = read_features(path, tokenizer).counts
    assert (counts.tokens, counts.unknown) == (4, 2)
    assert "50% of the tokens are not in the vocabulary" in caplog.text
    caplog.clear()
    read_features(_write(path, '{"src": ["the", "the"], "tgt": ["the"]}'), tokenizer)
    assert not caplog.text


def test_wrong_vocabulary_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = _write(tmp_path / "a.jsonl", '{"src": ["\u0120the", "\u0120cat"], "tgt": ["\u0120sat"]}')
    with pytest.raises(UserError, match=r"none of the 3 tokens is in the vocabulary .*vocab\.txt"):
        read_features(path, tokenizer)


def test_truncated_features_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = _write(tmp_path / "a.jsonl", *(json.dumps({"src": ["the"] * n, "tgt": ["the"] * n}) for n in range(1, 11)))
    lengths = read_features(path, tokenizer).lengths()
    special = special_ids(tokenizer)
    for mask_way, expected in (("v0", (3, 6)), ("v1", (4, 6)), ("v2", (4, 6))):
        masker = make_masker(mask_way, special, Masking(), 8, 5, random.Random(0))
        assert masker.truncated(*lengths) == expected


def test_collate_lays_out_source_target_pseudo() -> None:
    long = Sample([2, 9, 8, 3], [7, 4, 3], [4, 4, 4], [0, 1, 2], [7, 6, 3])
    short = Sample([2, 3], [5], [4], [0], [3])
    shifted = Sample([2, 9], [3, 7, 6], [], [0, 2], [7, 3])
    batch = collate([long, short, shifted])
    assert batch.input_ids.tolist() == [2, 9, 8, 3, 7, 4, 3, 4, 4, 4, 2, 3, 5, 4, 2, 9, 3, 7, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 0, 1, 2, 2, 0, 1, 2, 3, 4]
    assert batch.layout.segments.tolist() == [[4, 3, 3], [2, 1, 1], [2, 3, 0]]
    assert batch.layout.query_index().tolist() == [7, 8, 9, 13, 16, 17, 18]
    assert batch.predicted.tolist() == [0, 1, 2, 3, 4, 6]
    assert batch.labels.tolist() == [7, 6, 3, 3, 7, 3]
    assert batch.weights.tolist() == [1.0] * 6 and batch.weights.dtype == torch.float32
    assert batch.tokens == 19
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])


@pytest.mark.parametrize("multiple", [8, 64])
@pytest.mark.parametrize("last", [1, 3, 8, 20])
def test_collate_fills_up_to_a_multiple(multiple: int, last: int) -> None:
    samples = [Sample([2, 9, 8, 3], [7, 4, 3], [4, 4, 4], [0, 1, 2], [7, 6, 3])]
    samples.append(Sample([2] * 8, [5] * last, [], [last - 1], [3]))
    plain, filled = collate(samples), collate(samples, multiple)
    for name in ("predicted", "labels"):
        assert torch.equal(getattr(filled, name)[: plain.labels.numel()], getattr(plain, name))
    assert torch.equal(filled.input_ids[: plain.tokens], plain.input_ids) and filled.tokens == plain.tokens
    assert not filled.input_ids[plain.tokens :].any()
    assert filled.layout.total == filled.input_ids.numel() == filled.position_ids.numel()
    for count in (filled.layout.total, filled.layout.total_queries, filled.labels.numel()):
        assert count % multiple == 0
    assert filled.weights.sum() == plain.weights.sum() == 4
    idle = filled.predicted[filled.weights == 0]
    assert (idle >= plain.layout.total_queries).all() and (idle < filled.layout.total_queries).all()
