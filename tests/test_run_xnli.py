"""run_xnli: both layouts of the data, one language to train in and several to measure, a multilingual vocabulary."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Runner
from understanding_files import RUN, arguments, error_line, results, sentences, write_table, write_vocabulary

from minilm_fast import checkpoint
from minilm_fast.data.xnli import LABELS, LANGUAGES, find_train, parse_languages, read_split, read_xnli
from minilm_fast.errors import UserError
from minilm_fast.run_xnli import main, table
from minilm_fast.tokenization import Tokenizer
from minilm_fast.training.classification import ClassificationTask

ORIGINAL = "language\tgold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1\tsentence2\tpromptID"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(capfdbinary: Any) -> Runner:
    return Runner(capfdbinary)


def write_files(folder: Path, languages: tuple[str, ...] = ("en", "de", "sw"), train: int = 240) -> None:
    """One file a language."""
    for seed, language in enumerate(languages):
        for split, count in (("dev", 60), ("test", 90)):
            rows = [(i, a, b, LABELS[k]) for i, (a, b, k) in enumerate(sentences(count, 3, 7 * seed + len(split)))]
            write_table(folder / f"{split}-{language}.tsv", "index\tsentence1\tsentence2\tlabel", rows)
    rows = [(i, a, b, LABELS[k]) for i, (a, b, k) in enumerate(sentences(train, 3, 99))]
    write_table(folder / "train-en.tsv", "index\tsentence1\tsentence2\tlabel", rows)


def write_original(folder: Path, languages: tuple[str, ...] = ("en", "de", "sw"), train: int = 240) -> None:
    """The same as it is downloaded."""
    write_files(folder / "new", languages, train)
    spelled = {"contradiction": "contradictory"}
    rows = [
        (first, second, spelled.get(LABELS[int(e.label)], LABELS[int(e.label)]))
        for e in read_xnli(folder / "new" / "train-en.tsv")
        for first, second in [e.texts]
    ]
    write_table(folder / "XNLI-MT-1.0" / "multinli" / "multinli.train.en.tsv", "premise\thypo\tlabel", rows)
    for split in ("dev", "test"):
        found = read_split(folder / "new", split, languages)
        lines = [(language, LABELS[int(e.label)], "(", ")", *e.texts, 7) for language, es in found.items() for e in es]
        random.Random(0).shuffle(lines)
        write_table(folder / "XNLI-1.0" / f"xnli.{split}.tsv", ORIGINAL, lines)


def test_both_layouts_hold_the_same(tmp_path: Path) -> None:
    write_original(tmp_path)
    languages = parse_languages("sw,en,de")
    assert languages == ("en", "de", "sw")
    new, old = (read_split(folder, "test", languages) for folder in (tmp_path / "new", tmp_path))
    assert list(new) == list(old) == list(languages)
    for language in languages:
        assert sorted(new[language], key=str) == sorted(old[language], key=str)
    assert read_xnli(find_train(tmp_path, "en")) == read_xnli(tmp_path / "new" / "train-en.tsv")
    assert read_split(tmp_path / "new", "dev", ("en", "fr")).keys() == {"en"}


def test_undecided_pairs_are_passed_over_in_training_only(tmp_path: Path) -> None:
    path = tmp_path / "snli.tsv"
    write_table(path, "index\tsentence1\tsentence2\tgold_label", [(0, "a", "b", "neutral"), (1, "a", "c", "-")])
    with pytest.warns(UserWarning, match="1 examples without a decided label are passed over"):
        found = read_xnli(path, training=True)
    assert [example.texts for example in found] == [("a", "b")]
    with pytest.raises(UserError, match=r"snli\.tsv:3: the label '-' is not one of"):
        read_xnli(path)


def test_languages() -> None:
    assert parse_languages("all") == LANGUAGES and len(set(LANGUAGES)) == 15
    with pytest.raises(UserError, match="language 'jp' is not one of XNLI's: en, fr, es"):
        parse_languages("en,jp")


def test_table() -> None:
    measures = {"test_accuracy": 0.6, "test_en_accuracy": 0.8151, "test_fr_accuracy": 0.7}
    assert table(measures, ["en", "fr"]) == "| Average |   en |   fr |\n|    75.8 | 81.5 | 70.0 |\n"
    assert table({"test_accuracy": 0.5}, ["ur"]) == "| Average |   ur |\n|    50.0 | 50.0 |\n"


def test_trained_in_one_language_measured_in_three(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best on all languages' development sets together is measured on the test sets, which are computed once."""
    computed: list[int] = []
    plain = ClassificationTask.logits
    monkeypatch.setattr(
        ClassificationTask, "logits", lambda self, *args: (computed.append(len(args[0])), plain(self, *args))[1]
    )
    write_vocabulary(tmp_path)
    write_original(tmp_path / "data")
    flags = {
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "eval_all_checkpoints": True,
        "language": "sw,en,de",
    }
    outcome = run(main, *arguments(tmp_path, model_type="minilm", **(RUN | flags | {"max_steps": 40})))
    assert outcome.status == 0, outcome
    found = results(tmp_path / "out")
    assert found["metric"] == "dev_accuracy" and list(found["checkpoints"]) == [f"ckpt-{n}" for n in (10, 20, 30, 40)]
    accuracies = {name: measures["dev_accuracy"] for name, measures in found["checkpoints"].items()}
    assert found["checkpoint"] == max(accuracies, key=lambda name: accuracies[name])
    measures = found["measures"]
    each = [measures[f"test_{language}_accuracy"] for language in ("en", "de", "sw")]
    assert measures["test_accuracy"] == pytest.approx(sum(each) / 3) and measures["test_accuracy"] > 0.8
    assert computed == [60] * 3 * 4 + [90] * 3
    # A few measures a line.
    assert sum(line[9:].startswith("ckpt-40  dev_") for line in outcome.err.splitlines()) == 2
    tested = [name for name, kinds in found["checkpoints"].items() if "test_accuracy" in kinds]
    assert tested == [found["checkpoint"]]
    shown = (tmp_path / "out" / "xnli_table.txt").read_text()
    assert (
        shown.splitlines()[0].split() == ["|", "Average", "|", "en", "|", "de", "|", "sw", "|"] and shown in outcome.out
    )
    for language, accuracy in zip(("en", "de", "sw"), each, strict=True):
        lines = (tmp_path / "out" / f"predictions-{language}.tsv").read_text().splitlines()[1:]
        labels = [LABELS[int(e.label)] for e in read_split(tmp_path / "data", "test", (language,))[language]]
        right = sum(
            line.split("\t") == [str(i), label] for i, (line, label) in enumerate(zip(lines, labels, strict=True))
        )
        assert right / len(labels) == pytest.approx(accuracy)


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a SentencePiece vocabulary, as multilingual MiniLM is."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("multilingual")
    text = (" ".join(pair[:2]) for pair in sentences(300, 3))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_prefix=str(folder / "sentencepiece.bpe"), vocab_size=80, minloglevel=2
    )
    vocabulary = Tokenizer.from_pretrained(folder / "sentencepiece.bpe.model", model_type="xlm-roberta").vocab_size
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    BertModel(BertConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["minilm", "bert"])
def test_bert_with_the_vocabulary_of_xlm_r(model_type: str, multilingual: Path, tmp_path: Path) -> None:
    """The logits of what is saved are those of transformers, two separators between the texts, token types 0."""
    from transformers import BertForSequenceClassification

    write_files(tmp_path / "data", ("en",), train=40)
    flags = {"do_train": True, "do_eval": True, "do_predict": True, "max_steps": 2, "max_seq_length": 64}
    names = {"model_name_or_path": multilingual, "tokenizer_name": None, "model_type": model_type}
    assert main(arguments(tmp_path, language="en", **(RUN | flags | names))) == 0
    model = BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "XLMRobertaTokenizer"
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    predictions = (tmp_path / "out" / "predictions-en.tsv").read_text().splitlines()[1:]
    for example, line in zip(read_split(tmp_path / "data", "test", ("en",))["en"], predictions, strict=True):
        first, second = map(tokenizer.encode, example.texts)
        start, end = tokenizer.cls_id, tokenizer.sep_id
        with torch.no_grad():
            logits = model(torch.tensor([[start, *first, end, end, *second, end]])).logits
        assert line.split("\t")[1] == model.config.id2label[logits.argmax().item()]


def test_token_types_for_bert_only(tmp_path: Path) -> None:
    """With a WordPiece vocabulary the two model types train differently."""
    write_vocabulary(tmp_path)
    write_files(tmp_path / "data", ("en",), train=40)
    flags = {"do_train": True, "max_steps": 1, "language": "en"}
    for model_type in ("bert", "minilm"):
        folder = tmp_path / model_type
        assert main(arguments(tmp_path, model_type=model_type, output_dir=folder, **(RUN | flags))) == 0
    tables = [checkpoint.load(tmp_path / kind).state for kind in ("bert", "minilm")]
    bert, minilm = (state["bert.embeddings.token_type_embeddings.weight"] for state in tables)
    start = checkpoint.load(arguments(tmp_path)[1]).state["bert.embeddings.token_type_embeddings.weight"]
    # The first step's learning rate is not 0, as there is no warm-up.
    assert torch.equal(minilm[1], start[1]) and not torch.equal(bert[1], start[1])


Breaking = Callable[[Path], dict[str, object]]


def _written(name: str, content: bytes) -> Breaking:
    def write(folder: Path) -> dict[str, object]:
        (folder / "data" / name).write_bytes(content)
        return {}

    return write


HEADER = b"index\tsentence1\tsentence2\tlabel\n"
CUT_OFF = lzma.compress(b"".join([HEADER, *(b"%d\tw1 w2\tw3\tneutral\n" % i for i in range(1000))]))[:60]


def _cut_off(folder: Path) -> dict[str, object]:
    (folder / "data" / "test-sw.tsv").unlink()
    (folder / "data" / "test-sw.tsv.xz").write_bytes(CUT_OFF)
    return {}


WRONG: dict[str, tuple[Breaking, str]] = {
    "language": (lambda folder: {"language": "en,xx"}, "language 'xx' is not one of XNLI's"),
    "training language": (lambda folder: {"train_language": "xx"}, "language 'xx' is not one of XNLI's"),
    "two": (lambda folder: {"train_language": "en,de"}, "--train_language must be one language"),
    "none": (lambda folder: {"language": "de,sw"}, "--train_language must be one language"),
    "no data": (lambda folder: {"train_language": "de"}, "no training data in 'de': neither train-de.tsv nor"),
    "no test": (lambda folder: {"language": "en,fr"}, "neither test-fr.tsv nor XNLI-1.0/xnli.test.tsv"),
    "no dev": (lambda folder: {"language": "en,fr", "eval_all_checkpoints": True}, "neither dev-fr.tsv nor"),
    "label": (
        _written("dev-de.tsv", HEADER + b"0\tw1\tw2\tentails\n"),
        "dev-de.tsv:2: the label 'entails' is not one of",
    ),
    "column": (
        _written("train-en.tsv", b"premise\tlabel\nw1\tneutral\n"),
        "train-en.tsv:1: no column 'sentence2' or 'hypo' or 'hypothesis' (there are premise, label)",
    ),
    "empty": (_written("test-en.tsv", b""), "test-en.tsv holds no examples"),
    "cut off": (_cut_off, "test-sw.tsv.xz: the compressed file is cut off"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(name: str, tmp_path: Path, run: Runner) -> None:
    breaking, message = WRONG[name]
    write_vocabulary(tmp_path)
    write_files(tmp_path / "data", train=20)
    flags = {"language": "en,de,sw", "do_train": True, "do_eval": True, "max_steps": 2}
    outcome = run(main, *arguments(tmp_path, **(RUN | flags | breaking(tmp_path))))
    assert message in error_line(outcome)
    assert not list((tmp_path / "out").glob("ckpt-*"))


def test_a_language_that_the_shared_file_does_not_know(tmp_path: Path) -> None:
    row = ("xx", "neutral", "(", ")", "w1", "w2", 1)
    write_table(tmp_path / "XNLI-1.0" / "xnli.test.tsv", ORIGINAL, [("en", *row[1:]), row])
    with pytest.raises(UserError, match=r"xnli\.test\.tsv:3: language 'xx' is not one of XNLI's"):
        read_split(tmp_path, "test", ("en",))
