"""Runs that end early: what is kept, what a resumed run makes of it, and several processes."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from minilm_fast import decode
from minilm_fast.decoding import journal as journals
from minilm_fast.decoding.sharding import Group, set_threads
from minilm_fast.errors import UserError
from minilm_fast.modeling.model import Model
from minilm_fast.ops import forced_backend
from minilm_fast.ops._dispatch import EXTENSION_ERROR
from tests.command import MODEL, TINY, Runner, golden_sources, only_error, spawn, write_inputs

# The compiled kernels give a row the same bits whatever is computed beside it; PyTorch's own may differ in the last.
SAME_BITS = EXTENSION_ERROR is None and forced_backend() != "reference"
COPIES = 4
FLAGS = [*MODEL, "--beam_size", "3", "--need_score_traces"]
# A pause after every sentence, so that a signal arrives in the midst of the run.
# A shell that starts the tests in the background leaves them, and what they start, deaf to SIGINT.
SLOWLY = """
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)
from minilm_fast.decoding.journal import Journal
append = Journal.append
Journal.append = lambda self, record: (append(self, record), time.sleep(0.02))
"""


@pytest.fixture
def run(capfdbinary):
    runner = Runner(capfdbinary)
    return lambda *argv: runner(decode.main, *argv)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Input, flags and the files of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    inputs = write_inputs(folder / "in", golden_sources() * COPIES)
    assert decode.main([*FLAGS, "--input_file", str(inputs), "--output_file", str(folder / "out")]) == 0
    return folder


def _command(folder, output, *more):
    return [*FLAGS, "--input_file", folder / "in", "--output_file", output, *more]


def _same(output, folder):
    assert output.read_bytes() == (folder / "out").read_bytes()
    ours, theirs = (path.with_name(f"{path.name}.trace.pickle") for path in (output, folder / "out"))
    assert ours.stat().st_size == theirs.stat().st_size
    assert not SAME_BITS or ours.read_bytes() == theirs.read_bytes()
    assert not journals.journals_of(output)


def _lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _wait_for(path, lines, process):
    deadline = time.monotonic() + 120
    while _lines(path) < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


class _Cut:
    """Makes a run in this process end after some sentences."""

    def __init__(self, monkeypatch, error, after):
        whole = Model.generate_stream

        def stream(model, inputs, **options):
            for count, item in enumerate(whole(model, inputs, **options)):
                if count == after:
                    raise error
                yield item

        monkeypatch.setattr(Model, "generate_stream", stream)


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGKILL, -9, ""), (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_run_that_is_stopped_goes_on(number, status, word, run, undisturbed, tmp_path):
    output = tmp_path / "out"
    partial = journals.journal_path(output)
    process = spawn("decode", *_command(undisturbed, output), script=SLOWLY)
    _wait_for(partial, 20, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    if word:
        line = only_error(err.decode())
        assert line.startswith(f"error: {word}") and str(partial) in line and "--resume" in line
    kept = _lines(partial) - 1
    assert 19 <= kept < 26 * COPIES
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    outcome = run(*_command(undisturbed, output, "--resume"))
    assert outcome.status == 0, outcome
    # A last line that was cut off is decoded again.
    decoded = int(outcome.err.split("done: ")[1].split()[0])
    assert decoded in (26 * COPIES - kept, 26 * COPIES - kept + 1)
    _same(output, undisturbed)


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_torn_last_line_is_dropped(cut, run, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "out"
    partial = journals.journal_path(output)
    with monkeypatch.context() as patch:
        _Cut(patch, KeyboardInterrupt(), 10)
        assert run(*_command(undisturbed, output)).status == 130
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 11
    partial.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
    outcome = run(*_command(undisturbed, output, "--resume"))
    assert f"done: {26 * COPIES - 9} sentences" in outcome.err and "unfinished record" in outcome.err
    _same(output, undisturbed)


@pytest.mark.parametrize("size", [0, 5, 60])
def test_a_journal_killed_at_birth(size, run, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "out"
    partial = journals.journal_path(output)
    with monkeypatch.context() as patch:
        _Cut(patch, KeyboardInterrupt(), 1)
        run(*_command(undisturbed, output))
    partial.write_bytes(partial.read_bytes()[:size])
    assert run(*_command(undisturbed, output, "--resume")).status == 0
    _same(output, undisturbed)


def test_a_complete_journal_only_writes(run, undisturbed, tmp_path, monkeypatch):
    """Killed after the last sentence, before the output was there."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(decode.Decoding, "_write", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert run(*_command(undisturbed, output)).status == 143
    assert not output.exists()
    outcome = run(*_command(undisturbed, output, "--resume"))
    assert "done: 0 sentences" in outcome.err
    _same(output, undisturbed)


@pytest.fixture
def interrupted(run, undisturbed, tmp_path, monkeypatch):
    """A journal of ten sentences and the command that it belongs to."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        _Cut(patch, KeyboardInterrupt(), 10)
        assert run(*_command(undisturbed, output)).status == 130
    return output


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--beam_size", "4"], "beam_size"),
        (["--dtype", "int8"], "dtype"),
        (["--length_penalty", "0.5"], "length_penalty"),
        (["--config_path", str(TINY / "config_type0.json")], "config"),
        (["--subset", "50"], "input_file"),
    ],
)
def test_a_journal_of_another_run_is_refused(flags, name, interrupted, run, undisturbed):
    partial = journals.journal_path(interrupted)
    before = partial.read_bytes()
    line = run(*_command(undisturbed, interrupted, "--resume", *flags)).error()
    assert name in line and str(partial) in line
    assert partial.read_bytes() == before


def test_a_journal_of_other_sources_is_refused(interrupted, run, undisturbed, tmp_path):
    lines = (undisturbed / "in").read_text(encoding="utf8").splitlines(keepends=True)
    (tmp_path / "in").write_text("".join([*lines[1:], lines[0]]), encoding="utf8")
    argv = [*FLAGS, "--input_file", tmp_path / "in", "--output_file", interrupted, "--resume"]
    assert "input_file" in run(*argv).error()


def test_what_changes_no_answer_may_change(interrupted, run, undisturbed, tmp_path):
    """Such as the batch size, after a run that had too little memory; traces are padded to the batches of the last."""
    assert run(*_command(undisturbed, interrupted, "--resume", "--batch_size", "5")).status == 0
    assert run(*_command(undisturbed, tmp_path / "whole", "--batch_size", "5")).status == 0
    for suffix in ("", ".trace.pickle") if SAME_BITS else ("",):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_without_resume_a_run_starts_anew(interrupted, run, undisturbed):
    outcome = run(*_command(undisturbed, interrupted))
    assert f"done: {26 * COPIES} sentences" in outcome.err and "is overwritten" in outcome.err
    _same(interrupted, undisturbed)


def test_nothing_to_resume(run, undisturbed, tmp_path):
    outcome = run(*_command(undisturbed, tmp_path / "out", "--resume"))
    assert "starting from the beginning" in outcome.err
    _same(tmp_path / "out", undisturbed)


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_file_of_the_user_is_not_overwritten(resume, run, undisturbed, tmp_path):
    partial = journals.journal_path(tmp_path / "out")
    partial.write_text('{"src": "my own data"}\n')
    assert "not a journal" in run(*_command(undisturbed, tmp_path / "out", *resume)).error()
    assert partial.read_text() == '{"src": "my own data"}\n'


def test_two_runs_on_one_output(interrupted, run, undisturbed):
    with open(journals.journal_path(interrupted), "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another run" in run(*_command(undisturbed, interrupted, "--resume")).error()
        assert "another run" in run(*_command(undisturbed, interrupted)).error()
    assert _lines(journals.journal_path(interrupted)) == 11


def test_an_error_before_the_first_sentence_leaves_nothing(run, undisturbed, tmp_path, monkeypatch):
    _Cut(monkeypatch, UserError("something is wrong"), 0)
    assert run(*_command(undisturbed, tmp_path / "out")).error() == "error: something is wrong"
    assert list(tmp_path.iterdir()) == []


def test_several_checkpoints_go_on_at_the_one_that_was_interrupted(run, undisturbed, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"ckpt-{name}").symlink_to(TINY)
    argv = [*FLAGS, "--input_file", undisturbed / "in", "--model_path", tmp_path / "ckpt-?", "--split", "dev"]
    whole = Model.generate_stream
    calls = []

    def stream(model, inputs, **options):
        calls.append(len(inputs))
        for count, item in enumerate(whole(model, inputs, **options)):
            if len(calls) == 2 and count == 10:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(Model, "generate_stream", stream)
    assert run(*argv).status == 130
    assert (tmp_path / "ckpt-a.dev").exists() and not (tmp_path / "ckpt-b.dev").exists()
    assert run(*argv, "--resume").status == 0
    assert calls == [26 * COPIES, 26 * COPIES, 26 * COPIES - 10]
    for name in ("a", "b"):
        _same(tmp_path / f"ckpt-{name}.dev", undisturbed)


def test_disk_full_while_decoding(run, undisturbed, tmp_path):
    """What fits is kept; with room again the run goes on."""
    output = tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))"
    process = spawn("decode", *_command(undisturbed, output), script=limit)
    _, err = process.communicate(timeout=120)
    line = only_error(err.decode())
    partial = journals.journal_path(output)
    assert process.returncode == 2
    assert line.startswith(f"error: {partial}: cannot be written: File too large") and "--resume" in line
    assert partial.stat().st_size <= 40000 and _lines(partial) > 2
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    assert run(*_command(undisturbed, output, "--resume")).status == 0
    _same(output, undisturbed)


@pytest.mark.parametrize("files_before", [0, 1], ids=["traces", "output"])
def test_disk_full_while_writing_the_output(files_before, run, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.write_text("from an earlier run\n")
    replace = os.replace
    done = []

    def full(source, target):
        if len(done) == files_before:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert "No space left on device" in run(*_command(undisturbed, output)).error()
    assert output.read_text() == "from an earlier run\n"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    assert run(*_command(undisturbed, output, "--resume")).status == 0
    _same(output, undisturbed)


def _free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def _group(size, argv, script=""):
    """Starts the processes of a group as a launcher does."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "WORLD_SIZE": str(size)}
    return [spawn("decode", *argv, script=script, env={**address, "RANK": str(rank)}) for rank in range(size)]


def test_torchrun(undisturbed, tmp_path):
    """The input is shared; the files are those of one process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = map(str, _command(undisturbed, tmp_path / "out"))
    outcome = subprocess.run([*launcher, "-m", "minilm_fast.decode", *argv], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr.count("done: ") == 1
    _same(tmp_path / "out", undisturbed)


def test_a_process_that_dies_ends_all_and_the_run_goes_on(run, undisturbed, tmp_path):
    output = tmp_path / "out"
    first, second = _group(2, _command(undisturbed, output), SLOWLY)
    for rank, process in enumerate((first, second)):
        _wait_for(journals.journal_path(output, rank), 10, process)
    second.kill()
    _, err = first.communicate(timeout=120)
    second.communicate()
    assert first.returncode == 2 and "another process has ended early" in err.decode()
    assert not output.exists()
    # The first did all of its share, the second a part; one process goes on with both journals.
    journal_sizes = [_lines(path) - 1 for path in journals.journals_of(output)]
    assert journal_sizes[0] == 13 * COPIES and 9 <= journal_sizes[1] < 13 * COPIES
    outcome = run(*_command(undisturbed, output, "--resume"))
    decoded = int(outcome.err.split("done: ")[1].split()[0])
    assert decoded in (26 * COPIES - sum(journal_sizes), 26 * COPIES - sum(journal_sizes) + 1)
    _same(output, undisturbed)


def test_more_processes_go_on_where_one_stopped(interrupted, undisturbed):
    processes = _group(3, _command(undisturbed, interrupted, "--resume"))
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    _same(interrupted, undisturbed)


def test_processes_with_different_flags(undisturbed, tmp_path):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "WORLD_SIZE": "2"}
    processes = [
        spawn("decode", *_command(undisturbed, tmp_path / "out", *flags), env={**address, "RANK": rank})
        for rank, flags in (("0", []), ("1", ["--min_len", "4"]))
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "another process has ended early" in errors[0]
    assert "process 1: the processes differ in min_len" in errors[1]


@pytest.mark.parametrize(
    "environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "first"}, {"WORLD_SIZE": "-1"}], ids=str
)
def test_a_wrong_environment(environment):
    with pytest.raises(UserError):
        Group(environment)


@pytest.mark.parametrize("name", ["--input_file", "--output_file"])
def test_processes_cannot_share_a_stream(name, run, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert name in run(*_command(undisturbed, tmp_path / "out", name, "-")).error()


@pytest.mark.parametrize(
    ("requested", "environment", "expected"),
    [
        (3, {"OMP_NUM_THREADS": "5"}, 3),
        (None, {"OMP_NUM_THREADS": "5"}, None),
        (None, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, 4),
        (None, {"LOCAL_WORLD_SIZE": "16", "WORLD_SIZE": "16"}, 1),
        (None, {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}, 4),
        (None, {}, None),
    ],
)
def test_threads(requested, environment, expected, monkeypatch):
    """Eight cores, shared among the processes of the machine unless something else is asked for."""
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    set_threads(requested, Group(environment), environment)
    assert chosen == ([] if expected is None else [expected])


def test_a_damaged_record_and_what_follows_is_decoded_again(interrupted, run, undisturbed):
    """Such as after a power failure, which may leave a hole anywhere in what was not yet on disk."""
    partial = journals.journal_path(interrupted)
    lines = partial.read_bytes().splitlines(keepends=True)
    lines[6] = b"\0" * (len(lines[6]) - 1) + b"\n"
    partial.write_bytes(b"".join(lines))
    outcome = run(*_command(undisturbed, interrupted, "--resume"))
    assert f"done: {26 * COPIES - 5} sentences" in outcome.err
    _same(interrupted, undisturbed)


def test_records_are_on_disk_at_once(undisturbed, tmp_path):
    header = {"examples": 3}
    journal = journals.Journal(tmp_path / "j", header, resume=False)
    record = {"index": 1, "text": "a\nb", "score": -1.5, "source_length": 4, "truncated": 0, "unknown": 0}
    journal.append(record)
    assert json.loads((tmp_path / "j").read_text().splitlines()[1]) == record
    merged = journals.MergedJournals([tmp_path / "j"], header)
    assert list(merged.in_order()) == [record] and list(merged.done) == [1]
    journal.close()
    assert (tmp_path / "j").exists()
