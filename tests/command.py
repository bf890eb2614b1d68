"""What the tests of the command lines share: the tiny model's flags, and running a command in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

GOLDENS = Path(__file__).resolve().parent / "goldens"
TINY = GOLDENS / "tiny"
INPUTS = TINY / "inputs.jsonl"
TOKENIZER = ["--model_type", "bert", "--tokenizer_name", str(TINY / "vocab.txt"), "--do_lower_case"]
LENGTHS = ["--max_seq_length", "64", "--max_tgt_length", "24", "--batch_size", "7"]
MODEL = ["--model_path", str(TINY), *TOKENIZER, *LENGTHS]
BEAM = [*MODEL, "--input_file", str(INPUTS), "--beam_size", "4"]
T_BEAM4 = (GOLDENS / "trace" / "t_beam4").read_text(encoding="utf8")


@dataclass
class Outcome:
    """Exit status and what was printed."""

    status: int
    out: str
    err: str

    def error(self) -> str:
        """The one error line of a failed command."""
        assert self.status == 2, self
        return only_error(self.err)


def only_error(text: str) -> str:
    """The one line of standard error that is neither a note nor a warning."""
    lines = [line for line in text.splitlines() if not line.startswith(("note: ", "warning: "))]
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    return lines[0]


class Runner:
    """Runs commands in this process and catches what they print."""

    def __init__(self, capfdbinary) -> None:
        self._capture = capfdbinary

    def __call__(self, main, *argv) -> Outcome:
        self._capture.readouterr()
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as stop:
            status = stop.code
        out, err = self._capture.readouterr()
        return Outcome(status, out.decode(), err.decode())


def spawn(module: str, *argv, script: str = "", env: dict[str, str] | None = None, **options) -> subprocess.Popen:
    """Starts a command in a process of its own; ``script`` runs in it before."""
    code = f"import sys\n{script}\nfrom minilm_fast.{module} import main\nsys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        **options,
    )


def write_inputs(path: Path, sources) -> Path:
    """A file of JSON lines with these sources."""
    path.write_text("".join(json.dumps({"src": source}) + "\n" for source in sources), encoding="utf8")
    return path


def golden_sources() -> list[str | list[str]]:
    """The golden inputs."""
    return [json.loads(line)["src"] for line in INPUTS.read_text(encoding="utf8").splitlines()]
