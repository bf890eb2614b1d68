"""Plain-data pickles: what the original wrote can be read, and nothing else is run."""

import collections
import contextlib
import os
import pickle
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm_fast import safe_pickle
from minilm_fast.errors import UserError

TRACE = {
    "scores": [[-0.5, -1.25], [-2.0, -10000.5]],
    "wids": [[7, 30521], [3, 70000]],
    "ptrs": [[0, 0], [1, 0]],
}


def write_traces(path, traces, protocol=4, count=None):
    """The original's writer: a header, then one dictionary a sentence."""
    with open(path, "wb") as stream:
        header = {"version": 0.0, "num_samples": len(traces) if count is None else count}
        pickle.dump(header, stream, protocol=protocol)
        for trace in traces:
            pickle.dump(trace, stream, protocol=protocol)
    return path


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(records=st.lists(plain, min_size=1, max_size=4), protocol=st.sampled_from([2, 3, 4, 5]))
def test_any_plain_data_of_any_binary_protocol(tmp_path_factory, records, protocol):
    path = tmp_path_factory.mktemp("pickles") / "records"
    path.write_bytes(b"".join(pickle.dumps(record, protocol=protocol) for record in records))
    assert list(safe_pickle.load_records(path)) == records


@given(record=plain)
def test_what_is_written_is_read_by_plain_pickle(record):
    assert pickle.loads(safe_pickle.dumps(record)) == record


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_traces(tmp_path, protocol):
    long = {key: [[i * 3 + j for j in range(5)] for i in range(600)] for key in TRACE}
    path = write_traces(tmp_path / "t.trace.pickle", [TRACE, long, TRACE], protocol)
    assert list(safe_pickle.load_traces(path)) == [TRACE, long, TRACE]


def test_no_traces(tmp_path):
    assert list(safe_pickle.load_traces(write_traces(tmp_path / "t", []))) == []


def test_dump_appends_to_a_stream(tmp_path):
    path = tmp_path / "t"
    with open(path, "wb") as stream:
        for record in ({"version": 0.0, "num_samples": 1}, TRACE):
            safe_pickle.dump(record, stream)
    assert path.read_bytes() == write_traces(tmp_path / "u", [TRACE]).read_bytes()
    assert list(safe_pickle.load_traces(path)) == [TRACE]


@pytest.mark.parametrize("record", [{1, 2}, b"bytes", object, collections.OrderedDict(a=1), [complex(1, 2)]])
def test_only_plain_data_is_written(record):
    with pytest.raises(TypeError):
        safe_pickle.dumps(record)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_malicious_pickle_runs_nothing(tmp_path, protocol):
    path = tmp_path / "t"
    target = tmp_path / "made-by-the-pickle"
    path.write_bytes(
        pickle.dumps({"version": 0.0, "num_samples": 1}, protocol=4) + pickle.dumps(Bomb(target), protocol=protocol)
    )
    with pytest.raises(UserError, match="record 2: refused") as error:
        list(safe_pickle.load_traces(path))
    assert str(path) in str(error.value)
    assert not target.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x04\x8c\x04evilQ.",
        b"Pevil\n.",
        b"\x80\x04]b.",
        b"\x80\x04\x81.",
        b"\x80\x05\x97.",
        b"]2.",
    ],
)
def test_every_instruction_beyond_plain_data_is_refused(tmp_path, program):
    path = tmp_path / "t"
    path.write_bytes(program)
    with pytest.raises(UserError, match="record 1: refused"):
        list(safe_pickle.load_records(path))


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x04X\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"abc.",
        b"\x80\x04\x8b\xff\xff\xff\x7f.",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"].",
    ],
)
def test_no_instruction_gets_memory_that_the_file_does_not_explain(tmp_path, program):
    path = tmp_path / "t"
    path.write_bytes(program)
    start = time.perf_counter()
    with pytest.raises(UserError, match="record 1"):
        list(safe_pickle.load_records(path))
    assert time.perf_counter() - start < 1


def test_cut_off_at_every_byte(tmp_path):
    whole = write_traces(tmp_path / "whole", [TRACE, TRACE]).read_bytes()
    boundaries = {0, len(pickle.dumps({"version": 0.0, "num_samples": 2}, protocol=4))}
    boundaries.add(max(boundaries) + len(pickle.dumps(TRACE, protocol=4)))
    path = tmp_path / "cut"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as error:
            list(safe_pickle.load_traces(path))
        if length not in boundaries:
            assert f"record {1 + sum(length > end for end in boundaries if end)}" in str(error.value)


@given(data=st.binary(min_size=1, max_size=60))
def test_random_bytes_never_raise_anything_else(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("pickles") / "random"
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        list(safe_pickle.load_records(path))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (b"<html>", "record 1"),
        (b"\x80\x04]q\x00h\x05.", "record 1"),
        (b"\x80\x04e.", "record 1"),
        (b"\x80\x04.", "record 1"),
        (b"\x80\x63].", "record 1"),
        (b"\x80\x04}(]]u.", "record 1"),
    ],
)
def test_damaged(tmp_path, content, part):
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(safe_pickle.load_traces(path))
    assert part in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"scores": [[0.0, 1.0]]}, "steps"),
        ({"wids": [[1, 2], [3, 4.5]]}, "wids"),
        ({"ptrs": [[1, 2], [3]]}, "beams"),
        ({"scores": [[0.0, None], [0.0, 0.0]]}, "scores"),
        ({"scores": "abc"}, "lists"),
    ],
)
def test_records_that_are_no_traces(tmp_path, change, part):
    path = write_traces(tmp_path / "t", [TRACE, {**TRACE, **change}])
    with pytest.raises(UserError, match="record 3") as error:
        list(safe_pickle.load_traces(path))
    assert part in str(error.value)


def test_header_and_number_of_traces(tmp_path):
    with pytest.raises(UserError, match="says 3 traces, found 2"):
        list(safe_pickle.load_traces(write_traces(tmp_path / "t", [TRACE, TRACE], count=3)))
    with pytest.raises(UserError, match="says 1 traces"):
        list(safe_pickle.load_traces(write_traces(tmp_path / "t", [TRACE, TRACE], count=1)))
    with pytest.raises(UserError, match="not a trace file"):
        list(safe_pickle.load_traces(write_traces(tmp_path / "t", [TRACE], count="1")))
    (tmp_path / "t").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="not a trace file"):
        list(safe_pickle.load_traces(tmp_path / "t"))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(safe_pickle.load_traces(tmp_path / "absent"))
    with pytest.raises(UserError, match="cannot be read"):
        list(safe_pickle.load_traces(tmp_path))
