"""What every request passes before a route sees it: the key, and bounds on bodies."""

import asyncio
import logging
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import named
from .errors import error_body, full_body
from .metrics import ServerMetrics

_log = logging.getLogger(__name__)
MOST_BODY = 32 * 2**20  # bytes: images are in it
_BODIES = 2**30  # bytes: of all requests that are being answered
_BODY_SECONDS = 60.0  # for all of a body to come
# Without a key: what a load balancer asks, and the playground, whose files everybody has and which asks for the key.
_OPEN = ("/health", "/", *(f"/page/{file}" for file in ("page.js", "style.css")))


class Gate:
    """Asks for the key, bounds what bodies take, counts answers, and answers where something breaks.

    Plain ASGI, so that streams and clients that leave pass untouched.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._bytes = 0  # of the bodies of requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let the application do so."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                endpoint = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(endpoint, message["status"]).inc()
            await send(message)

        size = _announced(scope)
        if not self._may_pass(scope):
            refusal = error_body(401, "this server asks for a key: Authorization: Bearer KEY", "authentication_error")
            await refusal(scope, receive, counted)
            return
        if self._bytes and self._bytes + size > _BODIES:
            await full_body("the bodies of other requests fill the memory")(scope, receive, counted)
            return
        self._bytes += size
        try:
            await self._app(scope, _in_time(receive), counted)
        except Exception as error:  # a bug of ours: told, counted, and written down for whoever runs the server
            _log.exception("a request ended in an error that nobody expected")
            if not begun:
                await error_body(500, f"the server failed: {named(error)}", "server_error")(scope, receive, counted)
        finally:
            self._bytes -= size

    def _may_pass(self, scope: Scope) -> bool:
        if self._expected is None or scope["path"] in _OPEN:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self._expected)


def _in_time(receive: Receive) -> Receive:
    """A body that has come within its time; a client that sends it slower has left, for it keeps room from others."""
    until, whole = time.monotonic() + _BODY_SECONDS, False

    async def received() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
        except TimeoutError:
            return {"type": "http.disconnect"}
        whole = message["type"] == "http.request" and not message.get("more_body", False)
        return message

    return received


def _announced(scope: Scope) -> int:
    """Bytes of a body at most: what the client says, or what any may have."""
    said = dict(scope["headers"]).get(b"content-length", b"")
    if said.isdigit():
        return min(int(said), MOST_BODY)
    return MOST_BODY if b"transfer-encoding" in dict(scope["headers"]) else 0
