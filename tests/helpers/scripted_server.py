"""A small HTTP server on a real socket that speaks the protocol and does as a test tells it, and our client of it."""

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.rollouts.generators.interface import Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.server import ServerGenerator

SAMPLING = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=32, seed=5)


@dataclass
class Response:
    """What the server sends after ``wait`` seconds: a body with a status, or with ``hang_up`` half of it at most."""

    body: object = None
    status: int = 200
    headers: dict = field(default_factory=dict)
    wait: float = 0.0
    hang_up: str = ""


def said(text="Four.", finish="stop", tokens=None, logprobs=None, **extra):
    """A chat completion; ``extra`` goes into the choice."""
    names = ("token", "logprob", "id")  # the last where the server tells it
    content = None if logprobs is None else {"content": [dict(zip(names, one, strict=False)) for one in logprobs]}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, **extra}
    usage = None if tokens is None else {"completion_tokens": tokens, "prompt_tokens": 3, "total_tokens": 3 + tokens}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "usage": usage}
    return Response({**body, "choices": [{**choice, "logprobs": content}]})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen_headers.append({name.lower(): value for name, value in self.headers.items()})
        self.send(self.server.pages.get(self.path, Response({"detail": "Not Found"}, 404)))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            attempt = sum(b.get("seed") == body.get("seed") for b in server.bodies)
            server.bodies.append(body)
            server.times.append(time.monotonic())
            server.seen_headers.append({name.lower(): value for name, value in self.headers.items()})
        response = server.act(body, attempt)
        time.sleep(response.wait)
        with server.lock:
            server.under_way -= 1
        self.send(response)

    def send(self, response):
        content = response.body if isinstance(response.body, bytes) else json.dumps(response.body).encode()
        if response.hang_up != "at once":
            self.send_response(response.status)
            for name, value in {"Content-Type": "application/json", **response.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            while self.server.drip(content):
                self.wfile.write(b" ")
                time.sleep(0.02)
            self.wfile.write(content[: len(content) // 2] if response.hang_up else content)
        if response.hang_up:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, *arguments):
        pass


class ScriptedServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.act = lambda body, attempt: said()
        self.drip = lambda content: False  # whether blanks come instead, one by one
        self.pages = {"/v1/models": models(("m", "someone"))}
        self.lock, self.under_way, self.most_under_way = threading.Lock(), 0, 0
        self.bodies, self.times, self.seen_headers, self.connections = [], [], [], []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def get_request(self):
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self):
        """As if killed: nothing answers any more, not even to those who are connected."""
        self.shutdown()
        self.socket.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def models(*names):
    return Response({"object": "list", "data": [{"id": name, "object": "model", "owned_by": by} for name, by in names]})


def generator(server, /, **options):
    defaults = {"model": "m", "server": "other", "processor": "tiny-text", "backoff": 0.02, "concurrency": 4}
    return ServerGenerator(server.url, **{**defaults, **options})


def prompts(number, n=1):
    return [
        PromptRequest(Prompt(f"p{i}", [{"role": "user", "content": f"{i}?"}]), tuple(range(n))) for i in range(number)
    ]


def sample(server, /, number=1, n=1, sampling=SAMPLING, **options):
    return list(generator(server, **options).sample(prompts(number, n), sampling))
