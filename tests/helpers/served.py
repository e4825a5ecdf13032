"""A server of the tiny world on a port of its own, and clients for it."""

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request

import openai
import uvicorn

from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.serving.app import build_app
from lenvm_lightning.serving.service import Limits, Service

SEA = [{"role": "user", "content": "Write a text about the sea."}]


def generator_of(name="tiny-text", rows=16, lenvm=True):
    generator = LocalGenerator.load(name, rows=rows)
    if lenvm:
        generator.lenvm = LengthValueModel.from_pretrained(f"{name}-lenvm")
    return generator


class Server:
    """A running server."""

    def __init__(self, service, port, key):
        self.service, self.url, self.key = service, f"http://127.0.0.1:{port}", key

    def client(self, kind=openai.OpenAI):
        return kind(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0)

    def ask(self, path, body=None, key=None):
        """Status, headers and JSON (or text) of an answer."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        if key or self.key:
            headers["authorization"] = f"Bearer {key or self.key}"
        request = urllib.request.Request(self.url + path, data=content, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, _read(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.headers, _read(error)

    def wait_until_idle(self):
        until = time.monotonic() + 30
        while self.service.engine_loop.completions:
            assert time.monotonic() < until, "completions that nobody reads are still written"
            time.sleep(0.01)


def chat(server, **fields):
    control = fields.pop("lenvm", None)
    extra = {"extra_body": {"lenvm": control}} if control else {}
    return server.client().chat.completions.create(
        model="tiny-text", messages=fields.pop("messages", SEA), **extra, **fields
    )


def _read(answer):
    text = answer.read().decode()
    return json.loads(text) if text.startswith(("{", "[")) else text


@contextlib.contextmanager
def serving(generator, limits=None, key=None, **options):
    with Service(generator, limits or Limits(), **options) as service:
        config = uvicorn.Config(build_app(service, key), host="127.0.0.1", port=0, log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Server(service, server.servers[0].sockets[0].getsockname()[1], key)
        finally:
            server.should_exit = True
            thread.join()
