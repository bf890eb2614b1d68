"""Imports point one way, and importing the package loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "minilm_fast"
LAYERS = [
    {"errors", "_version", "atomic", "safe_pickle"},
    {
        "config",
        "layouts",
        "weights",
        "hub",
        "checkpoint",
        "wordpiece",
        "subword",
        "tokenization",
        "tokenizer_record",
    },
    {"ops", "kernels", "_C"},
    {"data", "integrations", "modeling"},
    {"training", "decoding", "distillation", "metrics"},
    {
        "cli",
        "decode",
        "distill",
        "encode",
        "evaluate",
        "evaluate_qa",
        "export_onnx",
        "gen_seq_from_trace",
        "run_glue",
        "run_seq2seq",
        "run_squad",
        "run_xnli",
    },
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# The facade stands beside the entry points: it ties modeling to decoding.
FACADE = "minilm_fast.modeling.model"


def _imports(path: Path) -> set[str]:
    module = ".".join(("minilm_fast", *path.relative_to(PACKAGE).with_suffix("").parts))
    package = module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.add(".".join([*base, node.module] if node.module else base))
    return {name for name in found if name.startswith("minilm_fast.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    module = ".".join(("minilm_fast", *parts))
    if parts[0] == "__init__" or module == FACADE:
        return
    own = RANK[parts[0]]
    for name in _imports(path):
        if name == FACADE:
            assert own == len(LAYERS) - 1, f"{module} imports the facade"
            continue
        assert RANK[name.split(".")[1]] <= own, f"{module} imports {name}, which is above it"


def test_import_is_light():
    heavy = "('torch', 'transformers', 'triton', 'datasets')"
    code = f"import minilm_fast, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_kernels_is_no_package():
    assert not (PACKAGE.parent / "kernels" / "__init__.py").exists()
