"""When a completion is asked for again, and when a server counts as dead: it may be busy, restarting, or gone.

The client's own retries stay off: with them each request would wait for itself, at most 8 s at a time, and a server
that is dead would look like a million requests that failed.
"""

import asyncio
import logging
import os
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import openai

from ....errors import GeneratorError
from ..interface import Failure, GeneratedText
from .responses import UnusableResponse

_log = logging.getLogger(__name__)
_UNREACHABLE = (502, 503, 504)  # what stands before the server answers, not the server
_FATAL = (401, 403, 404, 405)
_SAME_REFUSAL = 8  # prompts refused for the same reason, with nothing accepted yet, before all are believed to be
_LONGEST_BACKOFF = 60.0  # seconds
_LONGEST_WAIT_FOR_SERVER = 5.0  # seconds between attempts to reach it: a restarted one is found soon


@dataclass(frozen=True)
class FailedAttempt:
    """Why an attempt failed.

    Attributes:
        kind: ``unreachable`` = no server there, everybody waits; ``passing`` = this request may be tried again;
            ``refused`` = it will never be accepted; ``fatal`` = nor will any other.
        reason: for people.
        wait: seconds that the server asked to wait; None where it did not.
        answered: True = it was the server that said so: it is there.
    """

    kind: Literal["unreachable", "passing", "refused", "fatal"]
    reason: str
    wait: float | None = None
    answered: bool = False


def classify(error: Exception) -> FailedAttempt:
    """Say what a failed attempt means."""
    if isinstance(error, UnusableResponse):
        return FailedAttempt("passing", str(error), answered=True)
    if isinstance(error, openai.APIConnectionError):
        name = type(error.__cause__).__name__
        if name.startswith("Connect"):  # ConnectError, ConnectTimeout: nobody is there
            return FailedAttempt("unreachable", f"no connection: {_deepest(error)}")
        if isinstance(error, openai.APITimeoutError):
            return FailedAttempt("passing", f"no answer in time ({name})")
        return FailedAttempt("passing", f"the connection broke: {_deepest(error)}")
    if isinstance(error, openai.APIStatusError):
        status, wait = error.status_code, retry_after(error.response.headers)
        reason = f"{status}: {_said(error)}"
        if status in _UNREACHABLE:
            return FailedAttempt("unreachable", reason, wait)
        if status in _FATAL or error.code == "insufficient_quota":
            return FailedAttempt("fatal", reason)
        if status in (408, 409, 429) or status >= 500:
            return FailedAttempt("passing", reason, wait, answered=True)
        return FailedAttempt("refused", reason, answered=True)
    return FailedAttempt("passing", f"{type(error).__name__}: {error}")


def retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait, given as milliseconds, seconds or a date; None if it does not."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) * scale)
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError):
            pass
    return None


def _deepest(error: BaseException) -> str:
    """What the system said; what wraps it says less ("All connection attempts failed")."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def _said(error: openai.APIStatusError) -> str:
    """The server's own words: OpenAI's ``message``, FastAPI's ``detail``, or whatever it sent."""
    body: Any = error.body
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(key):
            body = body[key]
    text = " ".join(str(body or error.message).split())
    return text if len(text) <= 500 else text[:500] + "…"


class Reachability:
    """How long the server has not been there; shared by all requests.

    Args:
        timeout: seconds that nobody may reach it before it counts as dead.
        address: of the server, for messages.
    """

    def __init__(self, timeout: float, address: str) -> None:
        self._timeout, self._address = timeout, address
        self._since: float | None = None
        self._attempts = 0

    def answered(self) -> None:
        """Note that the server is there."""
        if self._since is not None:
            _log.warning("%s answers again after %.0f s", self._address, time.monotonic() - self._since)
        self._since, self._attempts = None, 0

    def unreachable(self, reason: str) -> None:
        """Note that it is not.

        Raises:
            GeneratorError: it has not been for longer than we wait.
        """
        now = time.monotonic()
        if self._since is None:
            self._since = now
            _log.warning("%s does not answer (%s); trying again for %g s", self._address, reason, self._timeout)
        self._attempts += 1
        if now - self._since > self._timeout:
            raise GeneratorError(
                f"the server at {self._address} has not answered for {now - self._since:.0f} s ({self._attempts} "
                f"attempts; the last one: {reason}). Start it again, or wait longer for it (unreachable_timeout=...)."
            )


class RetryPolicy:
    """Tries a request until there is a completion, or a reason why there is none; one for all requests of a run.

    Args:
        reachability: shared with nobody else.
        retries: how often one completion is asked for again.
        backoff: seconds before the first of these, doubled each time; at most a minute.
        longest_wait: seconds beyond which a server that asks to wait is not waited for.
        hide: takes secrets out of texts.
    """

    def __init__(
        self,
        reachability: Reachability,
        *,
        retries: int,
        backoff: float,
        longest_wait: float,
        hide: Callable[[str], str],
    ) -> None:
        self._reachability = reachability
        self._retries, self._backoff, self._longest_wait, self._hide = retries, backoff, longest_wait, hide
        self._accepted = False
        self._refused: dict[str, set[str]] = defaultdict(set)

    async def run(
        self, prompt_id: str, attempt: Callable[[], Awaitable[GeneratedText | Failure]]
    ) -> GeneratedText | Failure:
        """Make attempts at one completion until one of them is the last.

        Args:
            prompt_id: of the prompt.
            attempt: sends the request once, and reads the response.

        Raises:
            GeneratorError: nothing more can be asked of this server.
        """
        failures = waits = 0
        while True:
            try:
                result = await attempt()
                self._accepted = True
                self._reachability.answered()
                return result
            except (openai.APIError, UnusableResponse) as error:
                failed = classify(error)
            reason = self._hide(failed.reason)

            # 1. Nobody is there: that is no failure of this request. Wait for the server, with all others.
            if failed.kind == "unreachable":
                self._reachability.unreachable(reason)
                waits += 1
                await asyncio.sleep(failed.wait or _pause_before_reaching(waits))
                continue
            waits = 0
            if failed.answered:
                self._reachability.answered()

            # 2. Asking again would not help: neither this request nor, perhaps, any other.
            if failed.kind == "fatal":
                raise GeneratorError(self._hide(_describe_fatal(failed.reason)))
            if failed.kind == "refused":
                self._check_refusals(prompt_id, reason)
                return Failure(reason, final=True)

            # 3. It may pass: ask again, later each time, but not for ever.
            failures += 1
            if failures > self._retries:
                return Failure(f"{reason} (asked {failures} times)", final=False)
            if (failed.wait or 0) > self._longest_wait:
                return Failure(f"{reason} (the server asks to wait {failed.wait:.0f} s)", final=False)
            await asyncio.sleep(self._pause(failures, failed.wait))

    def _pause(self, failures: int, asked: float | None) -> float:
        """Seconds before the next attempt; spread, so that those who failed together do not come back together."""
        if asked is not None:
            return asked * random.uniform(1, 1.1)
        return min(_LONGEST_BACKOFF, self._backoff * 2 ** (failures - 1)) * random.uniform(0.5, 1)

    def _check_refusals(self, prompt_id: str, reason: str) -> None:
        self._refused[reason].add(prompt_id)
        if not self._accepted and len(self._refused[reason]) >= _SAME_REFUSAL:
            raise GeneratorError(
                f"the server refuses every request, {_SAME_REFUSAL} prompts for the same reason: {reason}. It may be "
                "a setting that it does not know, or another kind of server than was assumed (server=...)."
            )


def _pause_before_reaching(waits: int) -> float:
    """Seconds before a server that is not there is looked for again."""
    return min(_LONGEST_WAIT_FOR_SERVER, 0.25 * 2 ** min(waits, 10)) * random.uniform(0.5, 1)


def _describe_fatal(reason: str) -> str:
    advice = {
        "401": "The key is read from the environment (OPENAI_API_KEY unless api_key_env says otherwise).",
        "403": "The key is read from the environment (OPENAI_API_KEY unless api_key_env says otherwise).",
        "404": "Check the address (most end with /v1) and the model's name.",
        "405": "Check the address: most end with /v1.",
    }
    return f"the server answered {reason}\n{advice.get(reason[:3], '')}".rstrip()
