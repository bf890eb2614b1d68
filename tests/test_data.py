"""Reading, masking and batching of training data."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from minilm_fast.data.batching import collate
from minilm_fast.data.examples import Example, read_examples
from minilm_fast.data.masking import Sample
from minilm_fast.data.orders import LengthGroupedBatches, sequential_batch
from minilm_fast.errors import UserError


def _write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_reads_texts_tokens_and_blank_lines(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "a.jsonl",
        '{"src": "a b", "tgt": "c", "id": 1}',
        "",
        '{"src": [], "tgt": ["x", "##y"]}',
        '{"src": "line\\u2028separator", "tgt": "kept\u2028whole"}',
    )
    assert list(read_examples(path)) == [
        Example("a b", "c"),
        Example([], ["x", "##y"]),
        Example("line\u2028separator", "kept\u2028whole"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"src": "a", "tgt": ', "broken JSON"),
        ('{"tgt": "a"}', "no 'src'"),
        ('{"src": "a"}', "no 'tgt'"),
        ('["a", "b"]', "not a JSON object"),
        ('{"src": 3, "tgt": "a"}', "'src' is neither"),
        ('{"src": ["a", 1], "tgt": ["a"]}', "'src' is neither"),
        ('{"src": ["a"], "tgt": "a"}', "both"),
        ('{"src": "a", "tgt": "  "}', "'tgt' is empty"),
        ('{"src": ["a"], "tgt": []}', "'tgt' is empty"),
    ],
)
def test_wrong_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = _write(tmp_path / "a.jsonl", '{"src": "a", "tgt": "b"}', "", line)
    with pytest.raises(UserError, match=message) as caught:
        list(read_examples(path))
    assert str(caught.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_file_without_examples(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds no examples"):
        list(read_examples(path))


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        list(read_examples(tmp_path / "none.jsonl"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_examples(tmp_path / "binary"))


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


def test_sequential_batches_go_round() -> None:
    assert [sequential_batch(n, 3, 5) for n in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_grouped_batches_cover_an_epoch_once_with_little_padding() -> None:
    rng = random.Random(3)
    lengths = [rng.randint(10, 400) for _ in range(1000)]
    batches = LengthGroupedBatches(lengths, 8, seed=1)
    epoch = [batches[n] for n in range(125)]
    assert sorted(i for batch in epoch for i in batch) == list(range(1000))
    assert [batches[n] for n in range(125, 250)] != epoch
    assert [LengthGroupedBatches(lengths, 8, seed=1)[n] for n in (200, 3)] == [batches[200], batches[3]]
    assert LengthGroupedBatches(lengths, 8, seed=2)[0] != epoch[0]
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in epoch)
    assert padded < 1.03 * sum(lengths)
    first_lengths = [lengths[batch[0]] for batch in epoch]
    assert first_lengths != sorted(first_lengths)


def test_grouped_batches_of_fewer_examples_than_a_batch() -> None:
    batches = LengthGroupedBatches([5, 3, 4], 8, seed=0)
    assert sorted(batches[0]) == sorted(batches[7]) == [0, 1, 2]
