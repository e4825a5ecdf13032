"""Texts from elsewhere as they may be shown and written down: no terminal escapes, no endless lines, no passwords."""

import re
import reprlib
from typing import Any

_USER = re.compile(r"(https?://)[^/\s]*@", re.IGNORECASE)
_SECRET = re.compile(r"([?&][^=&\s]*(?:key|token|secret|passw|sig|auth)[^=&\s]*=)[^&\s'\"#]+", re.IGNORECASE)
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxstring, _REPR.maxother = 5, 10, 10, 200, 200


def as_shown(text: Any, most: int = 500) -> str:
    r"""A text that somebody else wrote, on one line of a terminal.

    Args:
        text: such as a server's error message; what is no text is shown as Python writes it, in short.
        most: characters that are left of it.

    Returns:
        White space as single spaces; control characters, and those that turn the direction of writing, spelt out
        (``\x1b``). What is cut off is a ``…``.
    """
    whole = text if isinstance(text, str) else _REPR.repr(text)
    begin = " ".join(whole[: 4 * most].split())  # somebody may send megabytes
    cut = len(begin) > most or len(whole) > 4 * most
    spelt = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in begin[:most])
    return spelt[:most] + ("…" if cut or len(spelt) > most else "")


def without_credentials(text: str) -> str:
    """A text, such as an address or a command line, without the user, the password and the keys of its addresses."""
    return _SECRET.sub(r"\1***", _USER.sub(r"\1", text))
