"""Upload against an endpoint of our own that speaks the Hub's protocol for small files."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bitnet.__main__ import main
from bitnet.errors import UserError
from bitnet.interchange.push import push


class Hub:
    """What was asked, and the files of the commit."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.files: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}
        self.refuse = 0


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def answer(self, content: Any, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            hub.asked.append(f"GET {self.path}")
            self.answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.asked.append(f"POST {self.path}")
            if hub.refuse:
                self.answer({"error": "no permission"}, hub.refuse)
            elif self.path == "/api/repos/create":
                hub.created = json.loads(body)
                self.answer({"url": f"http://{self.headers['Host']}/me/model"})
            elif "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.answer({"files": files, "commitOid": "0" * 40})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer(
                    {
                        "success": True,
                        "commitOid": "1" * 40,
                        "commitUrl": f"http://{self.headers['Host']}/me/model/commit/1",
                    }
                )
            else:
                self.answer({})

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "export"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(bytes(range(256)))
    return out


def test_a_folder_arrives_whole(hub, folder) -> None:
    assert push(folder, "me/model", private=True).endswith("/me/model/commit/1")
    assert hub.created["name"] == "model" and hub.created["organization"] == "me"
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_refusal_is_one_line_and_keeps_the_folder(hub, folder) -> None:
    hub.refuse = 403
    with pytest.raises(UserError, match=r"--push me/model: the upload failed") as caught:
        push(folder, "me/model")
    assert "\n" not in str(caught.value)
    assert (folder / "config.json").is_file()


def test_no_network_is_one_line(hub, folder, monkeypatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the upload failed") as caught:
        push(folder, "me/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a/b/c", "..", "me/mo del"])
def test_bad_names_are_refused(name, hub, folder) -> None:
    with pytest.raises(UserError, match="the upload failed"):
        push(folder, name)
    assert hub.files == {}


def test_private_needs_push(tmp_path, capsys) -> None:
    command = ["export", "nowhere", "--format", "hf", "--private", "--out", str(tmp_path / "x")]
    assert main(command) == 2
    assert "--private is for --push" in capsys.readouterr().err
