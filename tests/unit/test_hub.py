"""-hf against a hub on this machine: which file is chosen, resuming, offline, every refusal."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from mlacli.errors import ModelError, UsageError
from mlacli.hub import HubFile, choose, fetch
from mlacli.settings import default_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "me/demo"


class Hub(ThreadingHTTPServer):
    """The parts of the hub's API that a download uses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None  # bytes after which the next download breaks off
        self.asked: list[str] = []  # method, path and range of each request
        self.token = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, unquote(self.path).partition("?")[0]
        hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.fail(401, "GatedRepo")
        if path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": n, "size": len(d)} for n, d in hub.files.items()]
            found = {"_id": "1", "id": REPO, "sha": COMMIT, "siblings": siblings, "private": False}
            return self.answer(json.dumps(found).encode(), {"Content-Type": "application/json"})
        if path.startswith("/api/"):
            return self.fail(404, "RepoNotFound")
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name not in hub.files:
            return self.fail(404, "EntryNotFound")
        data = hub.files[name]
        self.answer(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def answer(self, data: bytes, headers: dict[str, str]) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            cut = self.server.cut if "ETag" in headers else None
            self.wfile.write(data[start:][:cut])
            if cut is not None:
                self.server.cut, self.close_connection = None, True

    def fail(self, code: int, reason: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    made = Hub()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, made.address)
    monkeypatch.setattr(constants, "ENDPOINT", made.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield made
    made.shutdown()
    made.server_close()


def fetched(name: str = REPO, **more: str | bool) -> tuple[bytes, list[str]]:
    notes: list[str] = []
    path = fetch(HubFile(name, **more), notes.append)  # type: ignore[arg-type]
    return path.read_bytes(), notes


def refused(name: str = REPO, **more: str | bool) -> str:
    with pytest.raises(ModelError) as caught:
        fetched(name, **more)
    text = str(caught.value)
    assert "\n" not in text
    return text


NAMES = ["README.md", "m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "mmproj-f16.gguf"]
PARTS = [f"Q8_0/m-Q8_0-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("wanted", "names", "found"),
    [
        ({}, NAMES, ["m-Q4_K_M.gguf"]),
        ({"hf_repo": "a/b:q2_k"}, NAMES, ["m-Q2_K.gguf"]),
        ({"hf_repo": "a/b:Q4_K_XL"}, NAMES, ["m-UD-Q4_K_XL.gguf"]),
        ({"hf_repo": "a/b:UD-Q4_K_XL"}, NAMES, ["m-UD-Q4_K_XL.gguf"]),
        ({"hf_file": "m-Q2_K.gguf"}, NAMES, ["m-Q2_K.gguf"]),
        ({}, ["z.gguf", "b.gguf"], ["b.gguf"]),
        ({"hf_repo": "a/b:Q8_0"}, NAMES + PARTS[::-1], PARTS),
        ({"hf_file": PARTS[1]}, PARTS, PARTS),
    ],
)
def test_the_file_that_is_meant(wanted: dict[str, str], names: list[str], found: list[str]) -> None:
    assert choose(HubFile(**{"hf_repo": "a/b"} | wanted), names) == found  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "names", "problem"),
    [
        ({"hf_repo": "a/b:Q4_K"}, NAMES, "no file of quantisation 'Q4_K' (there are m-Q2_K.gguf"),
        ({"hf_file": "x.gguf"}, NAMES, "no file 'x.gguf'"),
        ({}, ["README.md", "mmproj-f16.gguf"], "no GGUF file"),
        ({}, PARTS[:2], "lacks a part of the model: Q8_0/m-Q8_0-00003-of-00003.gguf"),
        ({}, ["m-00001-of-99999.gguf"], "99999 parts are out of range"),
    ],
)
def test_no_such_file(wanted: dict[str, str], names: list[str], problem: str) -> None:
    with pytest.raises(ModelError) as caught:
        choose(HubFile(**{"hf_repo": "a/b"} | wanted), names)  # type: ignore[arg-type]
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["abc", "a/b/c", "a/", "/b", "a/b:", "a b/c", "-/", "a/b:c d"])
def test_names_of_repositories(name: str) -> None:
    with pytest.raises(UsageError, match=r"^-hf: "):
        HubFile(name)


def test_a_model_is_fetched_once_and_then_found_offline(hub: Hub) -> None:
    hub.files = {"m-Q4_K_M.gguf": b"four" * 1000, "m-Q8_0.gguf": b"eight"}
    data, notes = fetched()
    assert data == b"four" * 1000 and notes == ["hub: me/demo: m-Q4_K_M.gguf (0.00 GiB)"]
    hub.asked.clear()
    assert fetched()[0] == data
    assert not any(line.startswith("GET /me") for line in hub.asked)  # asked for, not sent again
    hub.asked.clear()
    assert fetched(offline=True) == (data, []) and hub.asked == []
    assert "no file of quantisation 'Q8_0'" in refused(REPO + ":Q8_0", offline=True)
    assert "it is not in the cache" in refused("other/one", offline=True)


def test_all_parts_of_a_split_model_come(hub: Hub) -> None:
    hub.files = {name: name.encode() for name in PARTS}
    notes: list[str] = []
    path = fetch(HubFile(REPO), notes.append)
    assert [p.read_bytes() for p in sorted(path.parent.iterdir())] == [n.encode() for n in PARTS]


def test_what_broke_off_is_resumed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.files, hub.cut = {"a.gguf": bytes(range(256)) * 4096}, 300_000
    assert fetched()[0] == hub.files["a.gguf"]
    assert any("bytes=300000-" in line for line in hub.asked)


def test_a_hub_that_is_gone(hub: Hub) -> None:
    hub.files = {"a.gguf": b"abc"}
    assert fetched()[0] == b"abc"
    hub.shutdown()
    hub.server_close()
    data, notes = fetched()
    assert data == b"abc" and "the hub cannot be reached" in notes[0]
    assert "not in the cache, and the hub cannot be reached" in refused("other/one")


def test_what_the_hub_refuses(hub: Hub) -> None:
    hub.files = {"a.gguf": b"abc"}
    assert "no such repository" in refused("other/one")
    hub.token = "secret"
    assert "access must be asked for" in refused()
    assert fetched(hf_token="secret")[0] == b"abc"


def test_a_command_fetches_and_runs(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"demo-F16.gguf": default_model().read_bytes()}
    env = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "mlacli", "report", "-hf", f"{REPO}:F16", "-c", "256"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "demo-F16.gguf" in done.stdout
    assert "hub: me/demo: demo-F16.gguf" in done.stderr and "\x1b" not in done.stderr
    command[5] = "me/other"
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    for words in (["-hf", REPO, "-m", "x"], ["-hff", "x"], ["-hf", "x"]):
        command[4:] = words
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
