"""From a name to a folder: run directories, files that are no models, and a Hub that says no."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sparring.errors import CheckpointError
from sparring.models.checkpoint import load_model
from sparring.models.hub import config_of, resolve

SHA = "a" * 40


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch) -> Path:
    """The Hub's client with a cache of its own and no token."""
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return cache


@contextmanager
def hub(answers: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    """A Hub on loopback that knows these paths; everything else is not found."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            status, headers, body = answers.get(path, (404, {"X-Error-Code": "RepoNotFound"}, b""))
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def info(*files: str) -> tuple[int, dict[str, str], bytes]:
    siblings = [{"rfilename": file} for file in files]
    body = {"id": "org/name", "modelId": "org/name", "sha": SHA, "siblings": siblings, "tags": []}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def file(body: bytes) -> tuple[int, dict[str, str], bytes]:
    return 200, {"ETag": f'"{hash(body) & 0xFFFF:040x}"', "X-Repo-Commit": SHA}, body


def test_folders_and_run_directories(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve(str(tmp_path / "model")) == tmp_path / "model"
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (final / "adapter_config.json").write_text("{}")
    assert resolve(tmp_path / "run") == final


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, r"no model folder at .*missing"),
        (lambda p: p.mkdir(), "neither config.json nor adapter_config.json"),
        (lambda p: (p.mkdir(), (p / "recipe.toml").touch()), "run directory that has not finished"),
        (lambda p: (p.mkdir(), (p / "x.gguf").touch()), "GGUF files, which are for llama.cpp"),
        (lambda p: p.touch(), "give the folder it lies in"),
    ],
)
def test_what_is_no_model_is_told_apart(make, message: str, tmp_path: Path):
    path = tmp_path / "missing"
    make(path)
    with pytest.raises(CheckpointError, match=message):
        resolve(str(path))


def test_a_missing_adapter_is_named_before_any_weight_is_read(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("not even JSON")
    with pytest.raises(CheckpointError, match=r"no adapter folder at .*adapter_config.json"):
        load_model(tmp_path / "model", adapter=tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "message"),
    [("m.gguf", "GGUF is for llama.cpp"), ("m.bin", "pickled"), ("m.pt", "pickled")],
)
def test_single_files_are_refused(name: str, message: str, tmp_path: Path):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        resolve(tmp_path / name)


def test_a_misspelt_or_private_id(empty_cache: Path):
    with hub({}) as endpoint, pytest.raises(CheckpointError, match=r"'org/nane'.*not on the Hub"):
        resolve("org/nane", endpoint=endpoint)


def test_a_gated_id_says_where_to_accept_its_terms(empty_cache: Path):
    gated = (403, {"X-Error-Code": "GatedRepo"}, b"")
    answers = {
        "/api/models/org/name": info("config.json", "model.safetensors"),
        "/org/name/resolve/main/config.json": gated,
    }
    with (
        hub(answers) as endpoint,
        pytest.raises(CheckpointError, match=r"gated.*huggingface.co/org/name.*HF_TOKEN"),
    ):
        resolve("org/name", endpoint=endpoint)


def test_an_unreachable_hub_is_given_up_at_once(empty_cache: Path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"cannot be reached.*check the network.*local fold"):
        resolve("org/name", endpoint=f"http://127.0.0.1:{port}")
    assert time.monotonic() - started < 20


def test_a_hub_that_never_answers_is_given_up_in_time(empty_cache: Path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(CheckpointError, match="cannot be reached within 1 s"):
            resolve("org/name", endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=1)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("files", "message"),
    [(["pytorch_model.bin"], "pickled weights"), (["model-q4.gguf"], "GGUF")],
)
def test_repositories_without_safetensors(files: list[str], message: str, empty_cache: Path):
    answers = {
        "/api/models/org/name": info("config.json", *files),
        "/org/name/resolve/main/config.json": file(b"{}"),
    }
    with (
        hub(answers) as endpoint,
        pytest.raises(CheckpointError, match=f"no safetensors files.*{message}"),
    ):
        resolve("org/name", endpoint=endpoint)


def test_a_download_takes_weights_and_settings_and_no_code(empty_cache: Path):
    wanted = {"config.json": b"{}", "model.safetensors": b"w", "tokenizer.json": b"{ }"}
    others = ("modeling_x.py", "pytorch_model.bin", "consolidated.safetensors", "original/a.json")
    answers = {
        "/api/models/org/name": info(*wanted, *others),
        "/api/models/org/name/revision/main": info(*wanted, *others),
        **{
            f"/org/name/resolve/{revision}/{name}": file(body)
            for name, body in wanted.items()
            for revision in ("main", SHA)
        },
    }
    tree = [
        {"type": "file", "path": name, "size": len(wanted.get(name, b"")), "oid": f"{i:040x}"}
        for i, name in enumerate([*wanted, *others])
    ]
    answers[f"/api/models/org/name/tree/{SHA}"] = (
        200,
        {"Content-Type": "application/json"},
        json.dumps(tree).encode(),
    )
    with hub(answers) as endpoint:
        folder = resolve("org/name", endpoint=endpoint)
    assert {entry.name for entry in folder.iterdir()} == set(wanted)
    assert resolve("org/name", endpoint="http://127.0.0.1:9", seconds=3) == folder


def test_a_config_is_read_alone_from_a_file_a_folder_or_the_hub(tmp_path: Path, empty_cache: Path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"a": 1}')
    assert config_of(tmp_path / "base" / "config.json") == {"a": 1}
    assert config_of(tmp_path / "base") == {"a": 1}
    (tmp_path / "adapter").mkdir()
    adapter = json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    (tmp_path / "adapter" / "adapter_config.json").write_text(adapter)
    assert config_of(tmp_path / "adapter") == {"a": 1}
    with pytest.raises(CheckpointError, match="no model folder at"):
        config_of(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not here"):
        config_of("org/name", fetch=False)
    answers = {
        "/api/models/org/name": info("config.json"),
        "/org/name/resolve/main/config.json": file(b'{"b": 2}'),
    }
    with hub(answers) as endpoint:
        assert config_of("org/name", endpoint=endpoint) == {"b": 2}
    assert config_of("org/name", fetch=False) == {"b": 2}
