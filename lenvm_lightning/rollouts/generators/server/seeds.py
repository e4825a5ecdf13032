"""Whether requests have a seed: some servers cannot do with one."""

import logging
import re
from collections.abc import Awaitable, Callable

import openai

from ....utils.foreign_text import as_shown

_log = logging.getLogger(__name__)
_SPEAKS_OF_SEEDS = re.compile(r"\bseeds?\b|generator does not use offset", re.IGNORECASE)  # the second: torch on a CPU
_STATUSES = (400, 422, 500, 501)


class Seeds:
    """Asks with a seed, until the server refuses one and does without; from then on no request has one.

    Args:
        wanted: False = leave them out from the beginning.
        hide: takes secrets out of texts.
    """

    def __init__(self, wanted: bool, hide: Callable[[str], str]) -> None:
        self._wanted, self._hide = wanted, hide

    async def ask(self, request: Callable[[int | None], Awaitable[bytes]], seed: int) -> tuple[bytes, int | None]:
        """Send a request with the seed, or without one where it must be.

        Args:
            request: sends it once.
            seed: of the completion.

        Returns:
            The reply; and the seed that it was asked for with, None where that was without one.

        Raises:
            openai.OpenAIError: as ``request`` does.
        """
        if not self._wanted:
            return await request(None), None
        try:
            return await request(seed), seed
        except openai.APIStatusError as error:
            said = str(error.body or error.message)[:10_000]
            if error.status_code not in _STATUSES or not _SPEAKS_OF_SEEDS.search(said):
                raise
            reply = await request(None)
            if self._wanted:
                self._wanted = False
                _log.warning(
                    "The server does not take seeds (%d: %s) and answers without one. From now on requests have none: "
                    "these completions cannot be sampled a second time, and their records say so (seed: null).",
                    error.status_code,
                    as_shown(self._hide(said)),
                )
            return reply, None
