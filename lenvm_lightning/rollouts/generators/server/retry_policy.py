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
from urllib.parse import urlsplit

import openai

from ....errors import GeneratorError
from ....utils.foreign_text import as_shown
from ..interface import Failure, GeneratedText
from .reply import UnusableResponse

_log = logging.getLogger(__name__)
_UNREACHABLE = (502, 503, 504)  # what stands before the server answers, not the server
_FATAL = (401, 403, 404, 405)
_SAME_REFUSAL = 8  # prompts refused for the same reason, with nothing accepted yet, before all are believed to be
_LONGEST_BACKOFF = 60.0  # seconds
_LONGEST_WAIT_FOR_SERVER = 5.0  # seconds between attempts to reach it: a restarted one is found soon

_DIED_AT_ONCE = (
    " It hung up on its first requests and has been gone since. Some servers die of a request with a seed (vLLM on a "
    "CPU: 'CPU Generator does not use offset'): look at what it says itself, and leave seeds out with "
    "--options '{seeds: false}'."
)


@dataclass(frozen=True)
class FailedAttempt:
    """Why an attempt failed.

    Attributes:
        kind: ``unreachable`` = no server there, everybody waits; ``passing`` = this request may be tried again;
            ``refused`` = it will never be accepted; ``fatal`` = nor will any other.
        reason: for people.
        wait: seconds that the server asked to wait; None where it did not.
        answered: True = it was the server that said so: it is there.
        broke: True = it hung up.
    """

    kind: Literal["unreachable", "passing", "refused", "fatal"]
    reason: str
    wait: float | None = None
    answered: bool = False
    broke: bool = False


def classify(error: Exception, hide: Callable[[str], str] = str) -> FailedAttempt:
    """Say what a failed attempt means.

    Args:
        error: raised by the client, or on reading a reply.
        hide: takes secrets out of texts; before anything is cut short, so that no half of one is left.
    """

    def told(text: Any) -> str:
        return as_shown(hide(text) if isinstance(text, str) else text)

    if isinstance(error, UnusableResponse):
        begin = f"; it begins: {as_shown(hide(error.begin), 150)}" if error.begin else ""
        return FailedAttempt("passing", told(str(error)) + begin, answered=True)
    if isinstance(error, openai.APITimeoutError) and type(error.__cause__) is TimeoutError:
        return FailedAttempt("passing", f"no answer in time ({error.__cause__})")
    if isinstance(error, openai.APIConnectionError):
        name = type(error.__cause__).__name__
        if name.startswith("Connect"):  # ConnectError, ConnectTimeout: nobody is there
            return FailedAttempt("unreachable", f"no connection: {told(_deepest(error))}")
        if isinstance(error, openai.APITimeoutError):
            return FailedAttempt("passing", f"no answer in time ({name})")
        return FailedAttempt("passing", f"the connection broke: {told(_deepest(error))}", broke=True)
    if isinstance(error, openai.APIStatusError):
        return _classify_status(error, f"{error.status_code}: {told(_said(error))}")
    return FailedAttempt("passing", f"{type(error).__name__}: {told(str(error))}")


def _classify_status(error: openai.APIStatusError, reason: str) -> FailedAttempt:
    status, wait = error.status_code, retry_after(error.response.headers)
    if 300 <= status < 400:
        return FailedAttempt("fatal", f"{status}: it sends every request on to {_host_of_location(error)}")
    if status in _UNREACHABLE:
        return FailedAttempt("unreachable", reason, wait)
    if status in _FATAL or error.code == "insufficient_quota":
        return FailedAttempt("fatal", reason)
    if status in (408, 409, 429) or status >= 500:
        return FailedAttempt("passing", reason, wait, answered=True)
    return FailedAttempt("refused", reason, answered=True)


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
        except (ValueError, TypeError, OverflowError, OSError):  # no date, or one that no clock has
            pass
    return None


def _host_of_location(error: openai.APIStatusError) -> str:
    """Where a redirect leads, without its path, which may hold what was asked."""
    location = error.response.headers.get("location")
    if location is None:
        return "an address that it does not name"
    try:
        parts = urlsplit(location)
    except ValueError:
        return "an address that is none"
    host = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".removeprefix("://")
    return as_shown(host, 100) if parts.netloc else "another path of its own"


def _deepest(error: BaseException) -> str:
    """What the system said; what wraps it says less ("All connection attempts failed")."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def _said(error: openai.APIStatusError) -> Any:
    """The server's own words: OpenAI's ``message``, FastAPI's ``detail``, or whatever it sent."""
    body: Any = error.body
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(key):
            body = body[key]
    return body or error.message


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
        self._ever_answered = self._broke = False

    @property
    def seconds_left(self) -> float:
        """Until it counts as dead."""
        return self._timeout if self._since is None else max(0.0, self._timeout - (time.monotonic() - self._since))

    def answered(self) -> None:
        """Note that the server is there."""
        if self._since is not None:
            _log.warning("%s answers again after %.0f s", self._address, time.monotonic() - self._since)
        self._since, self._attempts, self._ever_answered = None, 0, True

    def broke(self) -> None:
        """Note that it hung up on a request."""
        self._broke = True

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
                + (_DIED_AT_ONCE if self._broke and not self._ever_answered else "")
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
                return Failure(self._hide(result.reason), result.final) if isinstance(result, Failure) else result
            except (openai.OpenAIError, UnusableResponse) as error:
                failed = classify(error, self._hide)

            # 1. Nobody is there: that is no failure of this request. Wait for the server, with all others.
            if failed.kind == "unreachable":
                self._reachability.unreachable(failed.reason)
                waits += 1
                # It may ask for a wait without end; ours has one.
                await asyncio.sleep(min(failed.wait or _pause_before_reaching(waits), self._reachability.seconds_left))
                continue
            waits = 0
            if failed.answered:
                self._reachability.answered()
            elif failed.broke:
                self._reachability.broke()

            # 2. Asking again would not help: neither this request nor, perhaps, any other.
            if failed.kind == "fatal":
                raise GeneratorError(describe_fatal(failed.reason))
            if failed.kind == "refused":
                self._check_refusals(prompt_id, failed.reason)
                return Failure(failed.reason, final=True)

            # 3. It may pass: ask again, later each time, but not for ever.
            failures += 1
            if failures > self._retries:
                return Failure(f"{failed.reason} (asked {failures} times)", final=False)
            if (failed.wait or 0) > self._longest_wait:
                return Failure(f"{failed.reason} (the server asks to wait {failed.wait:.0f} s)", final=False)
            await asyncio.sleep(self._pause(failures, failed.wait))

    def _pause(self, failures: int, asked: float | None) -> float:
        """Seconds before the next attempt; spread, so that those who failed together do not come back together."""
        if asked is not None:
            return asked * random.uniform(1, 1.1)
        return min(_LONGEST_BACKOFF, self._backoff * 2 ** (failures - 1)) * random.uniform(0.5, 1)

    def _check_refusals(self, prompt_id: str, reason: str) -> None:
        if self._accepted:
            return
        self._refused[reason].add(prompt_id)
        if len(self._refused[reason]) >= _SAME_REFUSAL:
            raise GeneratorError(
                f"the server refuses every request, {_SAME_REFUSAL} prompts for the same reason: {reason}. It may be "
                "a setting that it does not know, or another kind of server than was assumed (server=...)."
            )


def _pause_before_reaching(waits: int) -> float:
    """Seconds before a server that is not there is looked for again."""
    return min(_LONGEST_WAIT_FOR_SERVER, 0.25 * 2 ** min(waits, 10)) * random.uniform(0.5, 1)


def describe_fatal(reason: str) -> str:
    """A reason that begins with an HTTP status, with what to do about it."""
    advice = {
        **dict.fromkeys(
            ("301", "302", "303", "307", "308"),
            "Redirects are not followed: prompts and key go to the server that was named and to no other. If that is "
            "the right one, give its address.",
        ),
        "401": "The key is read from the environment (OPENAI_API_KEY unless api_key_env says otherwise).",
        "403": "The key is read from the environment (OPENAI_API_KEY unless api_key_env says otherwise).",
        "404": "Check the address (most end with /v1) and the model's name.",
        "405": "Check the address: most end with /v1.",
    }
    return f"the server answered {reason}\n{advice.get(reason[:3], '')}".rstrip()
