"""Checkpoints by name, against a small local server that speaks the hub's endpoints."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilm_fast import checkpoint, hub
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer

GOLDENS = Path(__file__).parent / "goldens"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves repositories from memory the way the hub does: resolve URLs with commit and ETag headers, and the API."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        # What goes wrong: (repository, file) -> "html", "short" (less than announced before), "cut",
        # "error" (of the server), "refused" (only the download itself), "gated"
        self.faults: dict[tuple[str, str], str] = {}
        self.commits: dict[str, str] = {}
        self.closed = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                outer.answer(self, body=True)

            def do_HEAD(self):
                outer.answer(self, body=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.closed = True
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request, body):
        if self.closed:  # connections that are kept alive outlive the listening socket
            request.close_connection = True
            return
        path = request.path.split("?")[0].strip("/")
        self.requests.append((request.command, path))
        if path.startswith("api/models/"):
            return self.answer_api(request, path.removeprefix("api/models/"), body)
        if "/resolve/" not in path:
            return self.send(request, 404, b"Not Found", body)
        repository, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        files = self.files.get(repository)
        if files is None:
            return self.send(request, 401, b"Repository not found", body, {"X-Error-Code": "RepoNotFound"})
        commit = self.commits.get(repository, COMMIT)
        if revision not in ("main", commit):
            return self.send(request, 404, b"", body, {"X-Error-Code": "RevisionNotFound"})
        headers = {"X-Repo-Commit": commit}
        fault = self.faults.get((repository, file))
        if fault == "gated":
            return self.send(request, 403, b"", body, {"X-Error-Code": "GatedRepo"})
        if fault == "error":
            return self.send(request, 503, b"<html>Service unavailable</html>", body)
        if fault == "refused" and body:
            return self.send(request, 403, b"<html>Forbidden</html>", body)
        if file not in files:
            return self.send(request, 404, b"Entry not found", body, {**headers, "X-Error-Code": "EntryNotFound"})
        content = files[file]
        headers["ETag"] = '"' + hashlib.sha256(content).hexdigest() + '"'
        if fault == "html":
            content = b"<!DOCTYPE html><html><body>Please sign in to this network</body></html>"
            headers["ETag"] = '"page"'
        if fault == "short" and body:
            content = content[: len(content) // 2]
        return self.send_range(request, content, body, headers, cut=fault == "cut" and body, key=(repository, file))

    def send_range(self, request, content, body, headers, cut, key):
        start = 0
        if body and (wanted := request.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(request, 206 if start else 200, content[start:], body, headers, cut=cut)
        if cut:
            del self.faults[key]

    def answer_api(self, request, name, body):
        repository, _, _ = name.partition("/revision/")
        if repository not in self.files:
            return self.send(request, 401, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": file} for file in self.files[repository]]
        answer = {"id": repository, "sha": self.commits.get(repository, COMMIT), "siblings": siblings}
        return self.send(request, 200, json.dumps(answer).encode(), body)

    def send(self, request, status, content, body, headers=None, cut=False):
        request.send_response(status)
        for key, value in (headers or {}).items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if not body:
            return
        request.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            request.wfile.flush()
            request.close_connection = True
            request.connection.shutdown(2)


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Hub()
    server.files["someone/tiny"] = {
        name: (GOLDENS / "tiny" / name).read_bytes() for name in ("config.json", "model.safetensors", "vocab.txt")
    }
    server.files["tiny-bin"] = {
        name: (GOLDENS / "tiny" / name).read_bytes() for name in ("config.json", "pytorch_model.bin", "vocab.txt")
    }
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def load(name, cache, **kwargs):
    found = checkpoint.resolve(name, cache_dir=cache, **kwargs)
    return checkpoint.load(found.weights, config=found.config), found


@pytest.mark.parametrize("name", ["someone/tiny", "tiny-bin"])
def test_download_by_id(server, cache, name):
    loaded, found = load(name, cache)
    expected = checkpoint.load(GOLDENS / "tiny").state
    for key, tensor in loaded.state.items():
        assert torch.equal(tensor, expected[key])
    tokenizer = Tokenizer.from_pretrained(found.tokenizer, do_lower_case=True)
    assert tokenizer.record() == Tokenizer.from_pretrained(GOLDENS / "tiny", do_lower_case=True).record()
    assert found.weights.is_relative_to(cache)


def test_second_time_nothing_is_downloaded(server, cache):
    load("someone/tiny", cache)
    server.requests.clear()
    load("someone/tiny", cache)
    assert not [path for method, path in server.requests if method == "GET" and "/resolve/" in path]


def test_offline_uses_the_cache_and_asks_nobody(server, cache, monkeypatch):
    before, _ = load("someone/tiny", cache)
    server.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    after, found = load("someone/tiny", cache)
    assert not server.requests
    assert all(torch.equal(before.state[name], after.state[name]) for name in before.state)
    assert Tokenizer.from_pretrained("someone/tiny", cache_dir=cache).vocab_size == 400
    assert Tokenizer.from_pretrained(found.tokenizer).vocab_size == 400
    with pytest.raises(UserError, match=r"^tiny-bin: config\.json is not in the cache, and offline mode is on$"):
        checkpoint.resolve("tiny-bin", cache_dir=cache)


def test_offline_without_the_weights(server, cache, monkeypatch):
    hub.fetch("someone/tiny", ["config.json"], cache_dir=cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"^someone/tiny: no weights in the cache, and offline mode is on"):
        checkpoint.resolve("someone/tiny", cache_dir=cache)


def test_hub_that_is_gone(server, cache, monkeypatch):
    load("someone/tiny", cache)
    server.close()
    with pytest.warns(UserWarning, match=r"the hub cannot be reached.*config\.json is the cached one"):
        loaded, _ = load("someone/tiny", cache)
    assert loaded.config.vocab_size == 400
    with pytest.raises(UserError, match=r"^tiny-bin: config\.json is not in the cache, and the hub cannot be reached"):
        checkpoint.resolve("tiny-bin", cache_dir=cache)


def test_no_such_repository(server, cache):
    with pytest.raises(UserError, match=r"^someone/else: neither a local file or folder nor a repository on the hub$"):
        checkpoint.resolve("someone/else", cache_dir=cache)
    with pytest.raises(UserError, match=r"^someone/else: neither"):
        Tokenizer.from_pretrained("someone/else", cache_dir=cache)


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "absent.bin", "a/b/c", "vocab.txt", "a b", "../up", ""])
def test_names_that_can_only_be_paths(server, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name:
        with pytest.raises(UserError, match="no such file or folder"):
            checkpoint.resolve(name)
    with pytest.raises(UserError, match="no such file or folder"):
        hub.fetch(name, ["config.json"])
    assert not server.requests


def test_repository_without_configuration_weights_or_vocabulary(server, cache):
    files = server.files["someone/tiny"]
    server.files["no/config"] = {"model.safetensors": files["model.safetensors"]}
    with pytest.raises(UserError, match=r"^no/config: the hub repository has no config\.json$"):
        checkpoint.resolve("no/config", cache_dir=cache)
    server.files["no/weights"] = {"config.json": files["config.json"], "tf_model.h5": b"x"}
    with pytest.raises(UserError, match=r"^no/weights: no weights in the hub repository"):
        checkpoint.resolve("no/weights", cache_dir=cache)
    server.files["no/vocabulary"] = {key: files[key] for key in ("config.json", "model.safetensors")}
    assert checkpoint.resolve("no/vocabulary", cache_dir=cache).tokenizer is None
    with pytest.raises(UserError, match="no vocabulary in this folder"):
        Tokenizer.from_pretrained("no/vocabulary", cache_dir=cache)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_web_page_in_place_of_a_file(server, cache, file):
    server.faults["someone/tiny", file] = "html"
    with pytest.raises(UserError, match="HTML") as error:
        load("someone/tiny", cache)
    assert file in str(error.value)


def test_transfer_shorter_than_announced(server, cache):
    server.faults["someone/tiny", "model.safetensors"] = "short"
    with pytest.raises(UserError, match=r"^someone/tiny: model\.safetensors: the download failed") as error:
        load("someone/tiny", cache)
    assert "\n" not in str(error.value)
    server.faults.clear()
    assert load("someone/tiny", cache)[0].config.vocab_size == 400


def test_broken_connection_is_resumed(server, cache):
    server.faults["someone/tiny", "model.safetensors"] = "cut"
    loaded, _ = load("someone/tiny", cache)
    assert torch.equal(
        loaded.state["cls.predictions.bias"], checkpoint.load(GOLDENS / "tiny").state["cls.predictions.bias"]
    )
    assert not server.faults


@pytest.mark.parametrize(
    ("fault", "part"),
    [("error", "cannot be reached"), ("refused", "the download failed"), ("gated", "asks for a login")],
)
def test_errors_of_the_server(server, cache, fault, part):
    server.faults["someone/tiny", "config.json"] = fault
    with pytest.raises(UserError) as error:
        checkpoint.resolve("someone/tiny", cache_dir=cache)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_shards(server, cache, tmp_path):
    raw = load_file(GOLDENS / "tiny" / "model.safetensors")
    names = sorted(raw)
    files = {"config.json": server.files["someone/tiny"]["config.json"]}
    weight_map = {}
    for number in range(2):
        shard = f"model-{number}.safetensors"
        save_file({name: raw[name] for name in names[number::2]}, tmp_path / shard)
        files[shard] = (tmp_path / shard).read_bytes()
        weight_map.update(dict.fromkeys(names[number::2], shard))
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    server.files["in/shards"] = files
    loaded, _ = load("in/shards", cache)
    assert all(torch.equal(loaded.state[name], raw[name]) for name in loaded.state)
    del files["model-1.safetensors"]
    with pytest.raises(UserError, match=r"no model-1\.safetensors"):
        load("in/shards", tmp_path / "other")


def test_parts_come_from_one_commit(server, cache, monkeypatch):
    """Somebody pushes between the download of the configuration and of the weights."""
    folder = hub.fetch("someone/tiny", ["config.json"], cache_dir=cache)
    server.commits["someone/tiny"] = "f" * 40
    with pytest.raises(UserError):
        hub.fetch("someone/tiny", ["model.safetensors"], revision=folder.name, cache_dir=cache)


def test_configuration_and_tokenizer_by_other_names(server, cache, tmp_path):
    """The triple of the published files, each part from somewhere else."""
    weights = shutil.copy(GOLDENS / "tiny" / "pytorch_model.bin", tmp_path / "minilm.bin")
    loaded, found = load(weights, cache, config_name="someone/tiny", tokenizer_name="someone/tiny")
    assert loaded.config.vocab_size == 400
    assert Tokenizer.from_pretrained(found.tokenizer, cache_dir=cache).vocab_size == 400
    found = checkpoint.resolve(weights, config_name=GOLDENS / "tiny", tokenizer_name=GOLDENS / "tiny" / "vocab.txt")
    assert found.config == GOLDENS / "tiny" / "config.json"
    assert checkpoint.load(found.weights, config=found.config).config == loaded.config
    found = checkpoint.resolve(GOLDENS / "tiny", config_name=GOLDENS / "tiny" / "config_type45.json")
    assert checkpoint.load(found.weights, config=found.config).config.target_type_id == 5
    assert found.tokenizer == str(GOLDENS / "tiny")
    assert checkpoint.resolve(weights).tokenizer is None


def test_environment_of_a_fresh_process(server, cache):
    """HF_ENDPOINT and HF_HUB_CACHE are honoured without any argument."""
    code = (
        "from minilm_fast import checkpoint\n"
        "found = checkpoint.resolve('someone/tiny')\n"
        "print(checkpoint.load(found.weights, config=found.config).layout, found.weights)\n"
    )
    environment = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(cache), "NO_PROXY": "127.0.0.1"}
    python = [sys.executable, "-W", "error::UserWarning", "-c", code]
    run = subprocess.run(python, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"bert {cache}")
    server.close()
    offline = {**os.environ, **environment, "HF_HUB_OFFLINE": "1"}
    again = subprocess.run(python, env=offline, capture_output=True, text=True, check=True)
    assert again.stdout == run.stdout
