"""What a wheel and a source distribution hold, and that the package works where nothing was compiled."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import minilm_fast

ROOT = Path(__file__).resolve().parent.parent
# A compiler that always fails: what a machine without one looks like to the build.
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


def _build(tmp_path, kind, **environment):
    settings = {"build-dir": str(tmp_path / "build")}
    code = f"from scikit_build_core import build; print(build.build_{kind}({str(tmp_path)!r}, {settings!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr + done.stdout)
    return tmp_path / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def plain_wheel(tmp_path_factory):
    return _build(tmp_path_factory.mktemp("wheel"), "wheel", **NO_COMPILER)


def test_wheel_without_compiler(plain_wheel):
    names = set(zipfile.ZipFile(plain_wheel).namelist())
    assert plain_wheel.name == f"minilm_fast-{minilm_fast.__version__}-py3-none-any.whl"
    held = ("__init__.py", "py.typed", "ops/reference.py", "kernels/attention.py")
    assert {f"minilm_fast/{name}" for name in held} <= names
    assert not any(name.endswith(".so") or name.startswith(("tests/", "examples/")) for name in names)
    assert "minilm_fast/kernels/__init__.py" not in names


def test_required_extension_fails_without_compiler(tmp_path):
    with pytest.raises(RuntimeError, match=r"CMake|cmake"):
        _build(tmp_path, "wheel", **NO_COMPILER, MINILM_FAST_REQUIRE_EXTENSION="1")


def test_source_distribution(tmp_path):
    path = _build(tmp_path, "sdist")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"CMakeLists.txt", "pyproject.toml", "csrc/registration.cpp", "csrc/include/isa.h", "LICENSE"} <= names
    assert not any(name.endswith(".safetensors") and name.startswith("examples/") for name in names)


def test_works_without_extension(plain_wheel, tmp_path):
    zipfile.ZipFile(plain_wheel).extractall(tmp_path)
    code = """
import sys, warnings, torch
sys.meta_path = [f for f in sys.meta_path if "scikit" not in type(f).__module__ and "editable" not in repr(f).lower()]
sys.path.insert(0, sys.argv[1])
import minilm_fast
assert minilm_fast.__file__.startswith(sys.argv[1]), minilm_fast.__file__
from minilm_fast import ops
layout = ops.SequenceLayout.seq2seq([3, 2], [2, 2])
q = torch.randn(9, 2, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ops.attention(q, q, q, layout)
    torch.ops.minilm_fast.bias_gelu(q[0], None)
    ops.bias_gelu(q[0])
print(len(caught), caught[0].message)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 all operators run in plain PyTorch, which is slower: cpu: the compiled extension")
