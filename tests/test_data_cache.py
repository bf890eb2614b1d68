"""The Arrow cache of tokenised features: what is wrong with it is noticed, and it is never used."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilm_fast.data import feature_cache
from minilm_fast.data.feature_cache import build_cache, load_features, open_cache
from minilm_fast.data.features import read_features
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer

pytest.importorskip("datasets")
TINY = Path(__file__).parent / "goldens" / "tiny"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(TINY / "vocab.txt", do_lower_case=True)


def _record(text: str) -> str:
    return json.dumps({"src": text, "tgt": text + " the"}) + "\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = random.Random(0)
    path = tmp_path / "train.jsonl"
    words = ["the", "Segu", "gota", "tazim", "!"]
    path.write_text("".join(_record(" ".join(rng.choices(words, k=rng.randrange(9)))) for _ in range(3000)))
    return path


@pytest.fixture
def cache(tmp_path: Path, data: Path, tokenizer: Tokenizer) -> Path:
    path = tmp_path / "features.arrow"
    assert build_cache(data, tokenizer, path)
    return path


def _leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


def test_cached_features_are_those_in_memory(cache: Path, data: Path, tokenizer: Tokenizer) -> None:
    expected = read_features(data, tokenizer)
    store = open_cache(data, tokenizer, cache)
    assert list(store) == list(expected)
    assert store.counts == expected.counts
    for found, wanted in zip(store.lengths(), expected.lengths(), strict=True):
        assert found.dtype == wanted.dtype and found.tolist() == wanted.tolist()
    assert list(store.select([5, 2999, 5])) == [expected[5], expected[2999], expected[5]]
    assert not _leftovers(cache.parent)


def test_whole_cache_is_used_as_it_is(
    cache: Path, data: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    before = os.stat(cache).st_ino
    caplog.set_level(logging.INFO)
    assert not build_cache(data, tokenizer, cache)
    os.utime(data)
    assert not build_cache(shutil.copy(data, data.with_name("copy.jsonl")), tokenizer, cache)
    assert os.stat(cache).st_ino == before
    assert "again" not in caplog.text


def test_datasets_reads_the_file_too(cache: Path, data: Path, tokenizer: Tokenizer) -> None:
    from datasets import Dataset

    table, store = Dataset.from_file(str(cache)), open_cache(data, tokenizer, cache)
    assert len(table) == len(store)
    assert table[7] == {"source_ids": store[7].source_ids, "target_ids": store[7].target_ids}


def test_features_are_mapped(cache: Path, data: Path, tokenizer: Tokenizer) -> None:
    store = open_cache(data, tokenizer, cache)
    assert str(cache) in Path("/proc/self/maps").read_text()
    assert len(store) == 3000


def _assert_rebuilt(
    cache: Path, data: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, message: str
) -> None:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert build_cache(data, tokenizer, cache)
    lines = [record.message for record in caplog.records if "building it again" in record.message]
    assert len(lines) == 1 and message in lines[0] and str(cache) in lines[0]
    assert list(open_cache(data, tokenizer, cache)) == list(read_features(data, tokenizer))


def test_cut_off_cache_is_built_again(
    cache: Path, data: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    whole = cache.read_bytes()
    for length in (0, 1, 3, 4, 100, len(whole) // 2, len(whole) - 500, len(whole) - 30, len(whole) - 1):
        cache.write_bytes(whole[:length])
        with pytest.raises(UserError, match="build it first"):
            open_cache(data, tokenizer, cache)
        _assert_rebuilt(cache, data, tokenizer, caplog, "is cut off or damaged")


def test_cache_that_grew_is_built_again(
    cache: Path, data: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_bytes(cache.read_bytes() + b"\0")
    _assert_rebuilt(cache, data, tokenizer, caplog, "is cut off or damaged")
    cache.write_bytes(b"\xff" + cache.read_bytes())
    _assert_rebuilt(cache, data, tokenizer, caplog, "is cut off or damaged")


def test_any_flipped_byte_is_noticed(cache: Path, data: Path, tokenizer: Tokenizer) -> None:
    whole = cache.read_bytes()
    fingerprint = feature_cache._fingerprint(data, tokenizer)
    rng = random.Random(1)
    tail = range(len(whole) - 600, len(whole))
    for place in [0, 1, 2, 3, 4, *rng.sample(range(len(whole)), 60), *tail]:
        with open(cache, "r+b") as stream:
            stream.seek(place)
            stream.write(bytes([whole[place] ^ (1 << rng.randrange(8))]))
        assert feature_cache._problem(cache, fingerprint), f"byte {place} of {len(whole)}"
        with open(cache, "r+b") as stream:
            stream.seek(place)
            stream.write(whole[place : place + 1])
    assert feature_cache._problem(cache, fingerprint) is None


def test_flipped_byte_in_the_middle_is_built_again(
    cache: Path, data: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    whole = bytearray(cache.read_bytes())
    whole[len(whole) // 2] ^= 1
    cache.write_bytes(whole)
    _assert_rebuilt(cache, data, tokenizer, caplog, "is damaged")


def test_changed_data_is_tokenised_again(
    cache: Path, data: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    old = os.stat(data)
    text = data.read_text()
    data.write_text(text.replace("gota", "Segu", 1))
    os.utime(data, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert data.stat().st_size == old.st_size
    _assert_rebuilt(cache, data, tokenizer, caplog, "was made from other data")
    data.write_text(text + _record("Segu"))
    with pytest.raises(UserError, match="was not made from"):
        open_cache(data, tokenizer, cache)
    _assert_rebuilt(cache, data, tokenizer, caplog, "was made from other data")


def test_other_vocabulary_or_case_is_tokenised_again(
    cache: Path, data: Path, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    message = "was made with another vocabulary or case"
    cased = Tokenizer.from_pretrained(TINY / "vocab.txt", do_lower_case=False)
    lines = (TINY / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*lines[:5], *reversed(lines[5:])]) + "\n")
    for other in (cased, Tokenizer.from_pretrained(tmp_path / "vocab.txt", do_lower_case=True)):
        with pytest.raises(UserError, match="was not made from"):
            open_cache(data, other, cache)
        _assert_rebuilt(cache, data, other, caplog, message)
    _assert_rebuilt(cache, data, tokenizer, caplog, message)


def test_other_format_is_tokenised_again(
    cache: Path, data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feature_cache, "_FORMAT", feature_cache._FORMAT + 1)
    _assert_rebuilt(cache, data, tokenizer, caplog, "was written by another version")


def test_a_file_that_is_no_cache_is_not_overwritten(tmp_path: Path, data: Path, tokenizer: Tokenizer) -> None:
    content = data.read_bytes()
    with pytest.raises(UserError, match="is no feature cache"):
        build_cache(data, tokenizer, data)
    assert data.read_bytes() == content
    (tmp_path / "lmdb").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("lmdb", "pipe"):
        with pytest.raises(UserError, match=f"{name} is there and is no file"):
            build_cache(data, tokenizer, tmp_path / name)


def test_bad_data_leaves_no_cache(tmp_path: Path, data: Path, tokenizer: Tokenizer) -> None:
    data.write_text(data.read_text() + '{"src": "a"}\n')
    for num_proc in (1, 2):
        with pytest.raises(UserError, match=r"train\.jsonl:3001: no 'tgt'"):
            build_cache(data, tokenizer, tmp_path / "new" / "features.arrow", num_proc=num_proc)
    data.write_text('{"src": ["zzzz"], "tgt": ["qqqq"]}\n')
    with pytest.raises(UserError, match="none of the 2 tokens"):
        build_cache(data, tokenizer, tmp_path / "new" / "features.arrow")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(UserError, match="cannot read"):
        build_cache(tmp_path / "none.jsonl", tokenizer, tmp_path / "features.arrow")


def test_data_that_changes_meanwhile_is_an_error(
    tmp_path: Path, data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = feature_cache._write_arrow

    def meddle(*arguments: object) -> object:
        found = original(*arguments)
        data.write_text(data.read_text() + _record("the"))
        return found

    monkeypatch.setattr(feature_cache, "_write_arrow", meddle)
    with pytest.raises(UserError, match="changed while it was read"):
        build_cache(data, tokenizer, tmp_path / "features.arrow")
    assert not (tmp_path / "features.arrow").exists() and not _leftovers(tmp_path)


def test_cache_that_cannot_be_written(tmp_path: Path, data: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        build_cache(data, tokenizer, tmp_path / "file" / "features.arrow")


BUILD = """
import signal, sys
from minilm_fast.data import feature_cache
from minilm_fast.tokenization import Tokenizer
data, vocabulary, cache = sys.argv[1:4]
write = feature_cache._write_arrow
def write_and_wait(*arguments):
    write(*arguments)
    print("written", flush=True)
    signal.pause()
if sys.argv[4:]:
    feature_cache._write_arrow = write_and_wait
feature_cache.build_cache(data, Tokenizer.from_pretrained(vocabulary, do_lower_case=True), cache)
"""


def _start_build(data: Path, cache: Path, *flags: str, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, str(data), str(TINY / "vocab.txt"), str(cache), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_full_disk_is_one_error(tmp_path: Path, data: Path) -> None:
    cache = tmp_path / "features.arrow"
    limit = 20_000
    build = _start_build(data, cache, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, errors = build.communicate(timeout=60)
    assert build.returncode != 0
    assert f"{cache}: cannot be written: File too large" in errors.splitlines()[-1]
    assert not cache.exists() and not _leftovers(tmp_path)


def test_a_killed_build_leaves_nothing_that_is_used(
    tmp_path: Path, data: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "features.arrow"
    build = _start_build(data, cache, "wait")
    assert build.stdout is not None and build.stdout.readline() == "written\n"
    build.send_signal(signal.SIGKILL)
    build.communicate()
    assert not cache.exists()
    (left,) = _leftovers(tmp_path)
    with pytest.raises(UserError, match="build it first"):
        open_cache(data, tokenizer, cache)
    with caplog.at_level(logging.INFO):
        assert build_cache(data, tokenizer, cache)
    assert left.exists(), "it may belong to a build that is under way"
    assert list(open_cache(data, tokenizer, cache)) == list(read_features(data, tokenizer))
    long_ago = time.time() - 2 * feature_cache._ABANDONED_AFTER
    os.utime(left, (long_ago, long_ago))
    cache.unlink()
    build_cache(data, tokenizer, cache)
    assert not _leftovers(tmp_path)


def test_builds_at_the_same_time(tmp_path: Path, data: Path, tokenizer: Tokenizer) -> None:
    cache = tmp_path / "features.arrow"
    builds = [_start_build(data, cache) for _ in range(2)]
    for build in builds:
        _, errors = build.communicate(timeout=60)
        assert build.returncode == 0, errors
    assert not build_cache(data, tokenizer, cache)
    assert list(open_cache(data, tokenizer, cache)) == list(read_features(data, tokenizer))
    assert not _leftovers(tmp_path)


def test_a_rebuilt_cache_does_not_disturb_its_readers(cache: Path, data: Path, tokenizer: Tokenizer) -> None:
    store, expected = open_cache(data, tokenizer, cache), list(read_features(data, tokenizer))
    data.write_text(_record("Segu"))
    assert build_cache(data, tokenizer, cache)
    assert list(store) == expected
    assert len(open_cache(data, tokenizer, cache)) == 1


def test_load_features_with_and_without_a_cache(tmp_path: Path, data: Path, tokenizer: Tokenizer) -> None:
    expected = list(read_features(data, tokenizer))
    assert list(load_features(data, tokenizer)) == expected
    assert list(load_features(data, tokenizer, cache_file=tmp_path / "a", num_proc=2)) == expected
    assert list(load_features(data, tokenizer, cache_file=tmp_path / "a")) == expected


def test_without_datasets_features_stay_in_memory(
    tmp_path: Path,
    data: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(feature_cache, "datasets_installed", lambda: False)
    cache = tmp_path / "features.arrow"
    with caplog.at_level(logging.INFO):
        assert len(load_features(data, tokenizer, cache_file=cache, required=False)) == 3000
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1 and "datasets is not installed" in lines[0] and "stay in memory" in lines[0]
    for call in (load_features, build_cache, open_cache):
        arguments = {"cache_file": cache}
        with pytest.raises(UserError, match=r"datasets is not installed \(pip install 'minilm_fast\[train\]'\)"):
            call(data, tokenizer, **arguments)
    assert not cache.exists()


def test_data_from_a_pipe_is_not_cached(
    tmp_path: Path, data: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="not a regular file"):
        load_features(pipe, tokenizer, cache_file=tmp_path / "a")
    with subprocess.Popen(["sh", "-c", f"cat '{data}' > '{pipe}'"]), caplog.at_level(logging.INFO):
        assert len(load_features(pipe, tokenizer, cache_file=tmp_path / "a", required=False)) == 3000
    assert "not a regular file" in caplog.text


def test_reading_data_imports_nothing_heavy() -> None:
    code = (
        "import sys, minilm_fast.data.feature_cache, minilm_fast.data.orders\n"
        "assert not {'datasets', 'pyarrow', 'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
