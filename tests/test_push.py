"""`aroma push` against a stand-in for the hub on localhost: what is sent, what is asked, and what is refused."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from aroma import verify_adapter
from aroma.card import CARD_FILE, PICTURE_FILE
from aroma.cli import main
from aroma.export import export_uniform
from aroma.tuner import live_adapter
from models import adapted, base, set_ranks
from tiny_classifier import save_tokenizer

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """Answers as the hub does, and remembers what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.calls: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.taken: set[str] = set()
        self.refuses: dict[str, int] = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _handle(self) -> None:
        hub, body, path = self.server, self._body(), self.path.partition("?")[0]
        hub.calls.append(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid user token."})
        elif status := next((code for part, code in hub.refuses.items() if part in path), None):
            self._answer(status, {"error": "no such luck"})
        elif path == "/api/whoami-v2":
            self._answer(200, {"name": "ann", "type": "user", "orgs": []})
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'ann'}/{wanted['name']}"
            if name in hub.taken:
                self._answer(409, {"error": "You already created this model repo", "url": f"{hub.endpoint}/{name}"})
            else:
                hub.created.append(wanted)
                self._answer(200, {"url": f"{hub.endpoint}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(200, {"commitUrl": f"{hub.endpoint}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self._answer(404, {"error": f"no {path}"})

    do_GET = do_POST = _handle


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a tokenizer, and beside it what a Trainer's checkpoint has and nobody should get."""
    folder = tmp_path_factory.mktemp("push") / "adapter"
    model = base("bert")
    model.config.id2label, model.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    model = adapted("bert", model)
    set_ranks(model, [2, 0, 1])
    live_adapter(model).ever_controlled = True
    model.save_pretrained(folder)
    save_tokenizer(folder)
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "diary.txt"):
        (folder / name).write_text("secret")
    return folder


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> list[str]:
    """Sit at the terminal; returns what is asked."""
    asked: list[str] = []

    def typed(prompt: str) -> str:
        asked.append(prompt)
        return text

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", typed)
    return asked


def test_what_is_shown_is_what_is_sent_after_a_yes(
    trained: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = {file.name: file.read_bytes() for file in trained.iterdir()}
    asked = answer(monkeypatch, "y")
    assert main(["push", str(trained), "ann/topics", "--private", "--license", "apache-2.0"]) == 0
    shown = capsys.readouterr().out
    assert asked == ["Upload? [y/N] "]
    assert hub.created == [{"name": "topics", "organization": "ann", "visibility": "private"}]
    own = {"adapter_config.json", "adapter_model.safetensors", "aroma_state.json"}
    tokenizer = {name for name in before if name.startswith(("tokenizer", "vocab", "special"))}
    assert {*hub.files} == own | tokenizer | {CARD_FILE, PICTURE_FILE}
    for name in own | tokenizer:
        assert hub.files[name] == before[name]
    for name in hub.files:
        assert f" {name} " in shown
    assert "to ann/topics, as ann" in shown
    assert "new, and private" in shown
    assert "Left out: diary.txt, optimizer.pt, trainer_state.json, training_args.bin" in shown
    assert "names the base model by a folder of this machine" in shown
    assert f"{hub.endpoint}/ann/topics" in shown
    # What others download is whole, and its card speaks of the repository.
    for name, content in hub.files.items():
        (tmp_path / "got").mkdir(exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    assert verify_adapter(tmp_path / "got")["about"]["labels"] == ["a", "b", "c"]
    card = ModelCard(hub.files[CARD_FILE].decode())
    assert 'PeftModel.from_pretrained(base, "ann/topics")' in card.text
    assert f"({PICTURE_FILE})" in card.text
    assert card.data.license == "apache-2.0"
    assert "| licence | apache-2.0 |" in card.text
    assert "| licence | none was given yet |" in before[CARD_FILE].decode()
    assert hub.files[PICTURE_FILE].startswith(b"\x89PNG")
    assert {file.name: file.read_bytes() for file in trained.iterdir()} == before, "nothing here was changed"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where matplotlib is not installed; drawing takes most of the time."""
    monkeypatch.setattr("aroma.hub.find_spec", lambda name: None)


def test_without_a_yes_nothing_is_made_or_sent(
    trained: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    for text in ("", "no", "Y E S"):
        answer(monkeypatch, text)
        assert main(["push", str(trained), "topics"]) == 1
        told = capsys.readouterr().out
        assert "nothing was uploaded" in told
        assert "to ann/topics" in told
        assert "public: everybody will see it" in told
        assert PICTURE_FILE not in told
    assert hub.calls == ["/api/whoami-v2"] * len(hub.calls), "it was only asked whose token it is"
    # Nobody at the terminal is no yes either.
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert main(["push", str(trained), "topics"]) == 2
    assert "--yes: missing, and there is no terminal to ask on" in capsys.readouterr().err
    assert not hub.created


def test_a_card_that_a_person_wrote_goes_as_it_is(trained: Path, hub: Hub, tmp_path: Path, capsys: Any) -> None:
    export_uniform(trained, tmp_path / "served")
    (tmp_path / "served" / CARD_FILE).write_text("# Mine\n")
    assert main(["push", str(tmp_path / "served"), "ann/served", "--yes", "--license", "mit"]) == 2
    assert "README.md is yours and goes as it is; write `license: mit` there" in capsys.readouterr().err
    assert main(["push", str(trained), "ann/topics", "--yes", "--license", "Apache 2"]) == 2
    assert "--license='Apache 2': the hub names licences like apache-2.0" in capsys.readouterr().err
    assert not hub.created
    assert main(["push", str(tmp_path / "served"), "ann/served", "--yes"]) == 0
    assert "README.md is yours, and goes as it is" in capsys.readouterr().out
    assert hub.files[CARD_FILE] == b"# Mine\n"
    assert PICTURE_FILE not in hub.files
    (tmp_path / "served" / PICTURE_FILE).write_bytes(b"png")
    assert main(["push", str(tmp_path / "served"), "ann/served", "--yes", "--update"]) == 0
    assert hub.files[PICTURE_FILE] == b"png", "a card that began as ours shows it"


def test_a_name_that_is_taken_and_an_update(
    trained: Path, hub: Hub, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    hub.taken.add("ann/topics")
    assert main(["push", str(trained), "ann/topics", "--yes"]) == 2
    assert "ann/topics: the name is taken; give another one, or --update" in capsys.readouterr().err
    assert not hub.files
    assert main(["push", str(trained), "ann/topics", "--yes", "--update"]) == 0
    assert "adapter_model.safetensors" in hub.files


def test_what_goes_wrong_is_one_line(
    trained: Path,
    hub: Hub,
    undrawn: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["push", *arguments, "--yes"]) == 2
        told = capsys.readouterr().err
        assert told.count("error: ") == 1
        assert not hub.files
        return told

    folder = str(trained)
    assert "no name of a repository" in refused(folder, "a/b/c")
    hub.refuses = {"repos/create": 403}
    assert "ann/x: the token may not write there; make one with the role `write`" in refused(folder, "ann/x")
    hub.refuses = {"repos/create": 500}
    assert "ann/x: the hub refused, with status 500" in refused(folder, "ann/x")
    hub.refuses = {"/preupload/": 403}
    assert "the repository is there, without these files; run the command again with --update" in refused(folder, "x")
    hub.refuses, made = {}, len(hub.created)

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in trained.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "adapter_model.safetensors: sha256=" in refused(str(damaged), "ann/x")
    get_peft_model(base("bert"), LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "plain")
    assert "aroma_state.json: the file is missing" in refused(str(tmp_path / "plain"), "ann/x")

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "token: the hub does not accept the token; run `hf auth login`" in refused(folder, "ann/x")
    monkeypatch.delenv("HF_TOKEN")
    assert "token: there is none for the hub; run `hf auth login`, or set HF_TOKEN" in refused(folder, "ann/x")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub at http://127.0.0.1:9 cannot be reached" in refused(folder, "ann/x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1: nothing can be uploaded; unset it" in refused(folder, "ann/x")
    assert len(hub.created) == made


@pytest.mark.slow
def test_the_program_reads_endpoint_and_token_from_the_environment(trained: Path, hub: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "aroma", "push", str(trained), "topics", "--yes"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in hub.files
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE=1: nothing can be uploaded" in done.stderr
