"""A Hugging Face hub on this machine: repositories are made, committed to and read from over HTTP, as the client does.

It knows what a push and a load of one model need, and keeps everything in memory.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import transformers
from huggingface_hub import constants

SHA = "c0ffee" + "0" * 34  # of the only commit there ever is


class Hub:
    """What the hub holds.

    Attributes:
        endpoint: its address.
        repos: by id, what was said when it was made.
        files: by repository and path, the content.
        commits: header of each commit: its summary and description.
        refuse: status code that every upload is answered with; None accepts them.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.repos: dict[str, dict] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[dict] = []
        self.refuse: int | None = None


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, value) -> None:
            self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = urlparse(self.path).path
            if hub.refuse is not None:
                return self._answer(hub.refuse, b'{"error": "no"}', X_Error_Message="you may not write here")
            if path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                hub.repos.setdefault(repo, asked)
                return self._json({"url": f"{hub.endpoint}/{repo}"})
            if path == "/api/validate-yaml":  # the front matter of a model card
                return self._json({"errors": [], "warnings": []})
            repo, _, rest = path.removeprefix("/api/models/").partition("/preupload/")
            if rest:
                names = [file["path"] for file in json.loads(body)["files"]]
                return self._json(
                    {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
                )
            repo = repo.partition("/commit/")[0]
            lines = [json.loads(line) for line in body.splitlines()]
            hub.commits.append(next(line["value"] for line in lines if line["key"] == "header"))
            for line in lines:
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.files.setdefault(repo, {})[line["value"]["path"]] = content
            return self._json({"commitUrl": f"{hub.endpoint}/{repo}/commit/{SHA}", "commitOid": SHA})

        def do_GET(self) -> None:
            path = urlparse(self.path).path.lstrip("/")
            repo, _, rest = path.partition("/resolve/")
            name = rest.partition("/")[2]
            content = hub.files.get(repo, {}).get(name)
            if content is None:
                return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self._answer(200, content, ETag=etag, X_Repo_Commit=SHA)

        do_HEAD = do_GET

    return Handler


@contextlib.contextmanager
def fake_hub() -> Iterator[Hub]:
    """Run a hub until the block is left."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def reached_hub(monkeypatch, cache: Path) -> Iterator[Hub]:
    """A hub that everything in this process takes for the real one, with a cache of its own."""
    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made before, it would ask the real one
        pattern = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield hub
