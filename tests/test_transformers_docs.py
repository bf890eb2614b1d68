"""The examples of docs/transformers.md run, one after the other."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import minilm_fast

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "transformers.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names: dict[str, Any] = {}
    assert len(BLOCKS) == 4
    for head, folder in ((minilm_fast.SequenceClassifier, "mrpc"), (minilm_fast.QuestionAnswerer, "squad1")):
        model = head.from_pretrained("examples/question-generation")
        model.save_pretrained(folder, model.tokenizer)
    for block in BLOCKS:
        exec(compile(block, "transformers.md", "exec"), names)
    assert names["model"].config._attn_implementation == "minilm_fast"
    batch, mask = names["batch"], names["batch"]["attention_mask"].bool()
    assert not mask.all()
    plain = transformers.AutoModel.from_pretrained(names["folder"], attn_implementation="eager").eval()
    with torch.no_grad():
        expected = plain(**batch).last_hidden_state
        torch.testing.assert_close(names["hidden"][mask], expected[mask], rtol=1e-4, atol=1e-5)
        ours, theirs = names["tagger"](**batch), names["theirs"].eval()(**batch).logits
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-4, atol=1e-5)
    printed = capsys.readouterr().out
    assert "['classifier.weight', 'classifier.bias']" in printed and "{0: 'O', 1: 'B-PER', 2: 'I-PER'}" in printed
    assert names["pretrainer"].bert.embeddings.word_embeddings.weight.grad.any()
    assert sum(names["found"].scores.values()) == pytest.approx(1)
    assert names["answer"].text in "A man is eating food." and len(names["answers"]) == 2


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if not link.startswith("http")]
    assert all((ROOT / "docs" / link).exists() for link in links)
