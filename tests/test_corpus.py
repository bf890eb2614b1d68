"""Documents from files, their tokens in an Arrow file, and the sequences that these are cut into."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm_fast.data import corpus_cache
from minilm_fast.data.corpus import DatasetCorpus, FileCorpus, expand
from minilm_fast.data.corpus_cache import PackedSequences, TokenisedCorpus, build_corpus
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]) + "\n")
    return Tokenizer.from_pretrained(path)


def _documents(corpus: FileCorpus | DatasetCorpus) -> list[str]:
    """Documents with their fragments joined by ``|``; empty ones left out."""
    found, current = [], []
    for text, ends in corpus.fragments():
        if text.strip():
            current.append(" ".join(text.split()))
        if ends:
            found.append("|".join(current))
            current = []
    assert not current, "the last document has no end"
    return [document for document in found if document]


def _text(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_blank_lines_part_documents(tmp_path: Path) -> None:
    path = _text(tmp_path / "a.txt", "\ufeffa b\nc\n\n \t\n\nd\r\n\r\ne")
    assert _documents(FileCorpus([path])) == ["a b|c", "d", "e"]
    assert _documents(FileCorpus([path], documents="line")) == ["a b", "c", "d", "e"]


def test_a_file_ends_a_document(tmp_path: Path) -> None:
    paths = [_text(tmp_path / "a.txt", "a\nb"), _text(tmp_path / "b.txt", "c\n")]
    assert _documents(FileCorpus(paths)) == ["a|b", "c"]


def test_records_are_documents(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "id": 1}) for text in ("a\nb", "", "c \ud800")]
    path = _text(tmp_path / "a.jsonl", "\n\n".join(lines))
    assert _documents(FileCorpus([path])) == ["a|b", "c \ufffd"]
    with pytest.raises(UserError, match=r"a.jsonl:1: no 'body' \(there are 'text', 'id'\)"):
        _documents(FileCorpus([path], text_field="body"))
    with pytest.raises(UserError, match="'id' is not a text"):
        _documents(FileCorpus([path], text_field="id"))


def test_rows_are_documents(tmp_path: Path) -> None:
    path = _text(tmp_path / "a.csv", 'id,text\n1,"a, b\nc"\n\n2,d\n')
    assert _documents(FileCorpus([path])) == ["a, b|c", "d"]
    path = _text(tmp_path / "a.tsv", "text\tid\na b\t1\n")
    assert _documents(FileCorpus([path])) == ["a b"]
    with pytest.raises(UserError, match=r"a.tsv:2: no 'body'"):
        _documents(FileCorpus([path], text_field="body"))
    path = _text(tmp_path / "b.csv", "text\na,b\n")
    with pytest.raises(UserError, match=r"b.csv:2: 2 columns, the first row names 1"):
        _documents(FileCorpus([path]))
    path = _text(tmp_path / "c.csv", 'text\n"a\n')
    with pytest.raises(UserError, match=r"c.csv:2: "):
        _documents(FileCorpus([path]))


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_compressed_files(tmp_path: Path, compress) -> None:
    content = compress(b'{"text": "a"}\n{"text": "b"}\n')
    suffix = "gz" if compress is gzip.compress else "xz"
    assert _documents(FileCorpus([_text(tmp_path / f"a.jsonl.{suffix}", content)])) == ["a", "b"]
    cut = _text(tmp_path / f"b.txt.{suffix}", content[:-6])
    with pytest.raises(UserError, match="cut off"):
        _documents(FileCorpus([cut]))


def test_a_data_set(tmp_path: Path) -> None:
    _text(tmp_path / "train.jsonl", '{"text": "a b"}\n{"text": "c\\nd"}\n')
    assert _documents(DatasetCorpus(str(tmp_path))) == ["a b", "c|d"]
    with pytest.raises(UserError, match="row 0: no 'body'"):
        _documents(DatasetCorpus(str(tmp_path), text_field="body"))
    with pytest.raises(UserError, match="nowhere"):
        _documents(DatasetCorpus(str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"a\nb\xff\n", r"a.txt:2: not UTF-8 text"),
        ("a.txt", b"a\n\xe4\xb8", r"a.txt:2: not UTF-8 text"),
        ("a.txt", b"a\0b", r"a.txt:1: NUL bytes"),
        ("a.txt", b"x" * (1 << 20) + b"\xff" + b"y" * (1 << 20), r"a.txt:1: not UTF-8 text"),
        ("a.txt", b"x" * ((1 << 20) - 1) + b"\xc3", r"a.txt:1: not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a.jsonl:2: not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text":', r"a.jsonl:2: broken JSON"),
        ("a.csv", b"text\n\xff\n", r"a.csv:2: not UTF-8 text"),
    ],
)
def test_bytes_that_are_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _documents(FileCorpus([_text(tmp_path / name, content)]))


def test_patterns(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        _text(tmp_path / name, "x")
    assert [path.name for path in expand([tmp_path / "*.txt", tmp_path / "d.csv"])] == ["a.txt", "b.txt", "d.csv"]
    assert [path.name for path in expand([f"{tmp_path}/**/*.txt"])] == ["a.txt", "b.txt", "c.txt"]
    for missing in (tmp_path / "*.md", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            expand([missing])


def test_long_lines_are_cut_between_words(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["\N{SNOWMAN}" * rng.randint(1, 9) for _ in range(150_000)]
    path = _text(tmp_path / "a.txt", "a\n" + " ".join(words) + "  \n\nb\n")
    fragments = list(FileCorpus([path]).fragments())
    assert len(fragments) > 3 and max(len(text.encode()) for text, _ in fragments) < 2 << 20
    assert [word for text, _ in fragments for word in text.split()] == ["a", *words, "b"]
    assert len(_documents(FileCorpus([path]))) == 2
    # Without a single space it is cut between characters.
    path = _text(tmp_path / "b.txt", "\N{SNOWMAN}" * 1_000_000)
    texts = [text for text, _ in FileCorpus([path]).fragments()]
    assert len(texts) > 2 and "".join(texts) == "\N{SNOWMAN}" * 1_000_000


def _built(folder: Path, tokenizer: Tokenizer, documents: list[list[str]], **options) -> TokenisedCorpus:
    content = "\n\n".join("\n".join(document) for document in documents)
    path = _text(folder / "text.txt", content)
    build_corpus(FileCorpus([path]), tokenizer, folder / "text.arrow", **options)
    return TokenisedCorpus(folder / "text.arrow")


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=8),
    length=st.integers(3, 24),
    chunk=st.integers(1, 300),
)
def test_every_token_is_in_exactly_one_sequence(tokenizer, tmp_path_factory, documents, length, chunk) -> None:
    """Whatever the lengths and the chunks: tokens in order, documents apart, no sequence too long or needless."""
    rng = random.Random(0)
    texts = [[" ".join(rng.choices(LETTERS, k=n)) for n in lines] for lines in documents]
    corpus_cache._CHUNK, before = chunk, corpus_cache._CHUNK
    try:
        corpus = _built(tmp_path_factory.mktemp("corpus"), tokenizer, texts)
    finally:
        corpus_cache._CHUNK = before
    expected = [tokenizer.encode(" ".join(lines)) for lines in texts]
    assert corpus.lengths.tolist() == [len(ids) for ids in expected]
    assert corpus.tokens == sum(map(len, expected))
    sequences = PackedSequences(corpus, tokenizer, length)
    found = iter(list(sequences))
    for ids in expected:
        pieces = [next(found).tolist() for _ in range(-(-len(ids) // (length - 2)))]
        assert all(p[0] == tokenizer.cls_id and p[-1] == tokenizer.sep_id for p in pieces)
        assert [i for piece in pieces for i in piece[1:-1]] == ids
        assert max(map(len, pieces)) <= length and max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert next(found, None) is None
    assert sequences.lengths().tolist() == [len(sequence) for sequence in sequences]
    assert np.array_equal(sequences[-1], sequences[len(sequences) - 1]) and len(sequences[0:2]) <= 2


def test_several_processes_give_the_same_file(tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(corpus_cache, "_CHUNK", 500)
    rng = random.Random(1)
    documents = [[" ".join(rng.choices(LETTERS, k=rng.randint(1, 40)))] for _ in range(60)]
    one = _built(tmp_path, tokenizer, documents)
    one.path.unlink()
    two = _built(tmp_path, tokenizer, documents, num_proc=2)
    assert one.digest == two.digest and len(one.lengths) == 60


def test_the_file_is_rebuilt_when_it_is_stale(tokenizer: Tokenizer, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    path, cache = _text(tmp_path / "a.txt", "a b\n"), tmp_path / "deep" / "a.arrow"
    corpus = FileCorpus([path])
    assert build_corpus(corpus, tokenizer, cache)
    assert not build_corpus(corpus, tokenizer, cache)
    first = TokenisedCorpus(cache).digest
    _text(path, "a c\n")
    os.utime(path, ns=(1, 1))
    assert build_corpus(corpus, tokenizer, cache) and "was made from other text" in caplog.text
    assert TokenisedCorpus(cache).digest != first
    assert build_corpus(FileCorpus([path], documents="line"), tokenizer, cache)
    other = tmp_path / "vocab.txt"
    other.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS[::-1]]) + "\n")
    assert build_corpus(FileCorpus([path], documents="line"), Tokenizer.from_pretrained(other), cache)
    assert "another vocabulary" in caplog.text
    content = cache.read_bytes()
    for damaged in (content[:-20], content[:100], b""):
        cache.write_bytes(damaged)
        assert build_corpus(corpus, tokenizer, cache) and "cut off or damaged" in caplog.text
        caplog.clear()
    _text(cache, "my thesis")
    with pytest.raises(UserError, match="is no tokenised corpus"):
        build_corpus(corpus, tokenizer, cache)
    assert cache.read_text() == "my thesis"


def test_a_damaged_byte_is_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Wherever it is: what is read afterwards is the corpus."""
    path, cache = _text(tmp_path / "a.txt", "a b c\n\nd e\n" * 20), tmp_path / "a.arrow"
    corpus = FileCorpus([path])
    build_corpus(corpus, tokenizer, cache)
    content, digest = cache.read_bytes(), TokenisedCorpus(cache).digest
    tokens = TokenisedCorpus(cache).slice(0, 100).tolist()
    rebuilt = 0
    for place in range(len(b"ARROW1"), len(content), 29):
        cache.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        rebuilt += build_corpus(corpus, tokenizer, cache)
        found = TokenisedCorpus(cache)
        assert found.digest == digest and found.is_whole() and found.slice(0, 100).tolist() == tokens
    # The other bytes are padding of the format, and copies of what is read elsewhere.
    assert rebuilt > len(content) / 29 / 3


def test_a_build_that_fails_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "a.arrow"
    for content, message in (
        ("\n \n\n", "holds no text"),
        ("", "holds no text"),
        ("1 2 3\n", "none of the 3 tokens is in the vocabulary"),
        (b"a\n" * 40 + b"\xff", "not UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            build_corpus(FileCorpus([_text(tmp_path / "a.txt", content)]), tokenizer, cache)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(UserError, match="no tokenised corpus"):
        TokenisedCorpus(cache)
    with pytest.raises(UserError, match="Not a directory"):
        build_corpus(FileCorpus([_text(tmp_path / "a.txt", "a")]), tokenizer, tmp_path / "a.txt" / "b.arrow")


def test_sequences_need_room(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--max_seq_length 2"):
        PackedSequences(_built(tmp_path, tokenizer, [["a"]]), tokenizer, 2)


_HUGE = """
import resource, sys
from minilm_fast.data.corpus import FileCorpus
from minilm_fast.data.corpus_cache import PackedSequences, TokenisedCorpus, build_corpus
from minilm_fast.tokenization import Tokenizer
from pathlib import Path
folder = Path(sys.argv[1])
tokenizer = Tokenizer.from_pretrained(folder / "vocab.txt")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
build_corpus(FileCorpus([folder / "small.txt"]), tokenizer, folder / "small.arrow")
before = peak()
build_corpus(FileCorpus([folder / "huge.txt"]), tokenizer, folder / "huge.arrow")
sequences = PackedSequences(TokenisedCorpus(folder / "huge.arrow"), tokenizer, 512)
assert len(TokenisedCorpus(folder / "huge.arrow").lengths) == 1
assert sum(len(s) - 2 for s in (sequences[i] for i in range(0, len(sequences), 97))) > 0
print(peak() - before, (folder / "huge.txt").stat().st_size // 1024)
"""


def test_one_huge_document_takes_little_memory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A document on a single line of 64 MB; what is added to the peak is far less than its text."""
    (tmp_path / "vocab.txt").write_text("\n".join(tokenizer.tokens) + "\n")
    line = ("word" * 12 + " a ") * 20_000
    _text(tmp_path / "small.txt", line * 3)
    with open(tmp_path / "huge.txt", "w") as file:
        for _ in range(64):
            file.write(line)
    out = subprocess.run([sys.executable, "-c", _HUGE, str(tmp_path)], capture_output=True, text=True, check=True)
    added, size = map(int, out.stdout.split())
    assert size > 60_000 and added < size / 3, (added, size)
