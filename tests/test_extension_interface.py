"""Python code and compiled extension that are not of one version: the number that tells, and what then happens.

After a change of operators ``python tests/test_extension_interface.py`` writes the record anew.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import minilm_fast.ops
from minilm_fast.ops import _extension

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "goldens" / "interface.json"
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


def current() -> dict[str, Any]:
    """The interface: its number, the operators' schemas, the functions of the module."""
    source = (ROOT / "csrc" / "registration.cpp").read_text()
    schemas = (str(schema) for schema in torch._C._jit_get_all_schemas())
    return {
        "interface": _extension.INTERFACE,
        "operators": sorted(
            schema.removeprefix("minilm_fast::")
            for schema in schemas
            if schema.startswith("minilm_fast::") and not schema.startswith("minilm_fast::triton_")
        ),
        "functions": sorted(re.findall(r'm\.def\(\s*"(\w+)"', source)),
    }


def test_a_changed_interface_has_another_number() -> None:
    recorded, found = json.loads(RECORD.read_text()), current()
    assert minilm_fast.ops.attention is not None and found["functions"]
    if recorded == found:
        return
    gone = [name for kind in ("operators", "functions") for name in recorded[kind] if name not in found[kind]]
    if gone and recorded["interface"] == found["interface"]:
        pytest.fail(f"changed or removed: {gone}: raise INTERFACE in ops/_extension.py and csrc/include/interface.h")
    pytest.fail("the interface has changed: python tests/test_extension_interface.py writes the record anew")


def test_both_sides_have_one_number() -> None:
    header = (ROOT / "csrc" / "include" / "interface.h").read_text()
    assert re.findall(r'define MINILM_FAST_INTERFACE "(\d+)"', header) == [str(_extension.INTERFACE)]
    if _extension.EXTENSION_ERROR is None:
        from minilm_fast import _C

        assert _C.interface == str(_extension.INTERFACE)


CODE = """
import sys, warnings
sys.meta_path = [f for f in sys.meta_path if "scikit" not in type(f).__module__ and "editable" not in repr(f).lower()]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from minilm_fast import ops
    from minilm_fast.decoding.fingerprint import of_arithmetic
    from minilm_fast.ops._dispatch import BackendError
    from minilm_fast.training.memory import keep_large_blocks
    x = torch.ones(2, 8)
    assert torch.equal(ops.bias_gelu(x), torch.nn.functional.gelu(x))
    assert not keep_large_blocks() and of_arithmetic().startswith("PyTorch")
    try:
        with ops.backend("cpu"):
            ops.bias_gelu(x)
    except BackendError as error:
        print(error)
    else:
        raise AssertionError
assert ops.__file__.startswith(sys.argv[1]), ops.__file__
print("minilm_fast._C" in sys.modules)
print(*(each.message for each in caught if each.category is RuntimeWarning), sep="\\n")
"""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x7fELF of long ago", r"older than the Python code \(interface 0, not {own}\); build it again: make setup"),
        (b"minilm_fast-interface:99999;", r"newer than the Python code \(interface 99999, not {own}\)"),
        (b"minilm_fast-interface:{own};", r"minilm_fast\._C cannot be imported"),
        (b"", r"minilm_fast\._C cannot be imported"),
    ],
)
def test_another_version_is_not_loaded(content: bytes, reason: str, tmp_path: Path) -> None:
    """The fake file cannot be loaded, so that an attempt would say so; the reference computes, with one warning."""
    own = str(_extension.INTERFACE)
    package = tmp_path / "minilm_fast"
    package.mkdir()
    for path in (ROOT / "minilm_fast").iterdir():
        if not path.name.startswith("_C"):
            (package / path.name).symlink_to(path)
    (package / f"_C{SUFFIX}").write_bytes(content.replace(b"{own}", own.encode()))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("MINILM_FAST_BACKEND", None)
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    forced, loaded, *warned = done.stdout.splitlines()
    expected = reason.replace("{own}", own)
    assert re.search(expected, forced) and forced.startswith("backend 'cpu' cannot run bias_gelu: ")
    assert loaded == "False" and len(warned) == 1, warned
    assert re.search(f"^all operators run in plain PyTorch, which is slower: .*{expected}", warned[0])


if __name__ == "__main__":
    RECORD.write_text(json.dumps(current(), indent=1) + "\n")
