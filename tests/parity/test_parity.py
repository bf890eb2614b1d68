"""The golden comparisons as tests: each backend, and with what must not change an answer switched."""

import pytest

import minilm_fast
from minilm_fast.ops._dispatch import EXTENSION_ERROR
from tests.parity import decode, files

BACKENDS = ["reference", "cpu"]
GROUPS = {path.stem: path for path in decode.groups()}
SWITCHES = [
    {"early_exit": False, "continuous_batching": False},
    {"batch_size": 1},
    {"batch_size": 3, "early_exit": False},
    {"batch_size": 26, "continuous_batching": False},
]
SWITCHED_GROUPS = ["beam1_T24_mask", "beam5_T24_mask", "beam4_T8_posshift", "relpos", "misc"]
_models = {backend: {} for backend in BACKENDS}


def _check(outcome):
    assert outcome.total > 0
    assert not outcome.failures, "\n".join(outcome.failures[:5])


@pytest.fixture(params=BACKENDS)
def backend(request):
    with minilm_fast.backend(request.param):
        yield request.param


def test_extension_is_built():
    assert EXTENSION_ERROR is None, EXTENSION_ERROR


@pytest.mark.parametrize("group", GROUPS)
def test_decode(backend, group):
    _check(decode.compare_group(GROUPS[group], _models[backend]))


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("group", SWITCHED_GROUPS)
def test_switches_change_no_answer(switches, group):
    _check(decode.compare_group(GROUPS[group], _models["cpu"], **switches))


def test_first_step(backend):
    _check(decode.compare_first_step(_models[backend]))


def test_ngrams(backend):
    _check(decode.compare_ngrams())


def test_preprocess():
    _check(decode.compare_preprocess())


def test_traces(backend):
    _check(files.compare_traces())


def test_tokenization():
    _check(files.compare_tokenization())


def test_layouts():
    _check(files.compare_layouts())
