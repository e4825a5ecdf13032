"""The connection to a server: where it goes, what it carries, and how much may come back in which time."""

import asyncio
import base64
import os
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import openai

from ....errors import GeneratorError
from ....utils.foreign_text import as_shown
from .reply import UnusableResponse

LARGEST_REPLY = 16 * 2**20  # bytes, unpacked: lists of models, ids of a long prompt that come back
BYTES_PER_TOKEN = 1024  # of a completion, with its id and log-probability
_LEAST_SECRET = 4  # characters; shorter ones are parts of ordinary words
_NEEDED = ("accept", "connection", "content-", "host", "transfer-encoding", "user-agent", "x-stainless-")
_READ = (b"location", b"retry-after", b"retry-after-ms")


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Attributes:
        url: for requests, without user and password.
        shown: for messages; without the query too, which may hold a key.
        user: name and password that stood in it; None without.
    """

    url: str
    shown: str
    user: tuple[str, str] | None = field(default=None, repr=False)


def read_address(url: str) -> Address:
    """Take an address apart; ``/v1`` is added where it has no path.

    Raises:
        GeneratorError: it is no address.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # a port may be no number
    except ValueError:
        sound = False
    if not sound:
        shown = as_shown(url.rpartition("@")[2], 200)  # nothing of a password that was not written as it must be
        raise GeneratorError(f"{shown!r} is no address of a server; one looks like http://localhost:8000")
    user = (unquote(parts.username or ""), unquote(parts.password or ""))
    parts = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/") or "/v1")
    return Address(urlunsplit(parts), urlunsplit(parts._replace(query="", fragment="")), user if any(user) else None)


@dataclass(frozen=True)
class Credentials:
    """What is sent to a server and shown to nobody.

    Args:
        key_env: environment variable that holds the key; empty = no key is sent, nor anything else that variables of
            the client say.
        user: name and password of the server's address, which go instead of a key.
    """

    key_env: str
    user: tuple[str, str] | None = field(default=None, repr=False)

    def key(self) -> str:
        """The key; empty where there is none.

        Raises:
            GeneratorError: it cannot be a key.
        """
        key = os.environ.get(self.key_env, "").strip() if self.key_env else ""
        if not (key.isascii() and key.isprintable()):
            raise GeneratorError(f"${self.key_env} holds characters that no key can have: look at what it was set to")
        return key

    def hide(self, text: str) -> str:
        """A text without them; servers and clients like to repeat what they got."""
        secrets = [os.environ.get(self.key_env, "").strip()]
        if self.user is not None:
            secrets += [base64.b64encode(":".join(self.user).encode()).decode(), self.user[1]]
        for secret in secrets:
            if len(secret) >= _LEAST_SECRET:
                text = text.replace(secret, "***").replace(repr(secret)[1:-1], "***")
        return text

    def told(self) -> str:
        """Which of them goes along, for people; empty where none does."""
        if self.user is not None:
            return "user and password of the address are"
        return f"the key in ${self.key_env} is" if self.key() else ""


class BoundedClient(openai.DefaultAsyncHttpxClient):
    """Sends requests to one host only, and takes replies that are neither endless nor endlessly long.

    Args:
        deadline: seconds for a request and its whole reply.
        largest: bytes of a reply, unpacked.
        nameless: leave out whatever a request does not need.
        **options: of the client.
    """

    def __init__(self, *, deadline: float, largest: int, nameless: bool, **options: Any) -> None:
        # A server that sends prompts and images on to another host may not choose that host.
        super().__init__(follow_redirects=False, **options)
        self._deadline, self._largest, self._nameless = deadline, largest, nameless

    async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Send one request, and read all of the reply.

        Raises:
            openai.APITimeoutError: it took too long.
            UnusableResponse: it is too long.
        """
        if self._nameless:
            for name in [name for name in request.headers if not name.lower().startswith(_NEEDED)]:
                del request.headers[name]
        try:
            async with asyncio.timeout(self._deadline):
                response = await super().send(request, stream=True, **options)
                try:
                    content = await self._read(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            late = TimeoutError(f"it was not whole after {self._deadline:g} s")
            raise openai.APITimeoutError(request=request) from late
        # It is unpacked now. JSON is UTF-8 whatever the server says, which may be the name of no encoding at all.
        headers = [(name, value) for name, value in response.headers.raw if name.lower() in _READ]
        headers.append((b"content-type", b"application/json"))
        return type(response)(response.status_code, headers=headers, content=content, request=request)

    async def _read(self, response: Any) -> bytes:
        parts, size = [], 0
        async for part in response.aiter_bytes():
            size += len(part)
            if size > self._largest:
                raise UnusableResponse(f"the server's answer is longer than {self._largest / 2**20:.0f} MiB")
            parts.append(part)
        return b"".join(parts)


def open_client(address: Address, credentials: Credentials, *, deadline: float, largest: int) -> openai.AsyncOpenAI:
    """The client of a server; its own retries are off.

    Args:
        address: of the server.
        credentials: what is sent along.
        deadline: seconds for a request and its whole reply.
        largest: bytes of a reply, unpacked.

    Raises:
        GeneratorError: the key cannot be one, or the address not be used.
    """
    timeout = openai.Timeout(deadline, connect=10.0)
    key = credentials.key()
    http = BoundedClient(
        deadline=deadline, largest=largest, nameless=not credentials.key_env, timeout=timeout, auth=credentials.user
    )
    # A key has to be given, or the client takes one from another variable than was named.
    return openai.AsyncOpenAI(
        base_url=address.url, api_key=key or "none", max_retries=0, timeout=timeout, http_client=http
    )


async def answered(call: Awaitable[bytes]) -> bytes:
    """The bytes of a reply: what somebody asked an `open_client` for.

    Raises:
        openai.OpenAIError: the server did not answer, or refused.
        UnusableResponse: the reply is too long.
    """
    try:
        return await call
    except openai.APIConnectionError as error:  # older versions wrap whatever is raised in `send`
        if isinstance(error.__cause__, UnusableResponse | openai.APITimeoutError):
            raise error.__cause__ from error.__cause__.__cause__
        raise
