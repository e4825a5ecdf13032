"""Whom a key may be sent to. A recipe names any server and any variable; whoever wrote it is not who has the key.

So a key goes to OpenAI, to this machine, and to servers that were named on the command line. To others goes none.
"""

import ipaddress
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar
from urllib.parse import urlsplit

from ..evaluation.settings import EvaluationSettings
from ..rollouts.sample import is_server
from ..utils.foreign_text import as_shown
from .sample_stage import SampleSettings

_OFFICIAL = "api.openai.com"
_PORTS = {"http": 80, "https": 443}

Settings = TypeVar("Settings", SampleSettings, EvaluationSettings)


def named_servers(overrides: Iterable[tuple[str, str | None]]) -> frozenset[str]:
    """The servers that a command line names.

    Args:
        overrides: (key, value) pairs, as `read_recipe` takes them.

    Returns:
        Scheme, host and port of each.
    """
    given = [(value or "").strip(" '\"") for key, value in overrides if key.rpartition(".")[2] == "generator"]
    return frozenset(filter(None, (_origin(address) for address in given if is_server(address))))


def without_foreign_keys(many: Sequence[Settings], named: frozenset[str]) -> list[Settings]:
    """Settings of a recipe, such that no key goes where only the recipe says; what goes nowhere is said on stderr.

    Args:
        many: of several tasks, or of the sample stage alone.
        named: from `named_servers`.
    """
    kept: list[Settings] = []
    told: set[tuple[str, str]] = set()
    for settings in many:
        address, options = settings.generator or "", settings.options or {}
        if not is_server(address) or (origin := _origin(address)) in named or _is_trusted(address):
            kept.append(settings)
            continue
        kept.append(replace(settings, options={**options, "api_key_env": ""}))
        variable = options.get("api_key_env", "OPENAI_API_KEY")
        if isinstance(variable, str) and variable.isidentifier() and os.environ.get(variable):
            told.add((origin, variable))
    for origin, variable in sorted(told):
        print(
            f"no key is sent to {as_shown(origin, 200)}: only the recipe names it. If ${variable} may go there, "
            "name the server yourself: --generator ADDRESS",
            file=sys.stderr,
            flush=True,
        )
    return kept


def _origin(address: str) -> str:
    """Scheme, host and port of an address; empty where it is none."""
    try:
        parts = urlsplit(address)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return ""
    return f"{parts.scheme}://{parts.hostname}:{port}" if parts.hostname else ""


def _is_trusted(address: str) -> bool:
    """Whether a key may go to an address whoever names it: OpenAI's, encrypted, or one of this machine."""
    scheme, _, rest = _origin(address).partition("://")
    host = rest.rpartition(":")[0]
    if scheme == "https" and f".{host}".endswith(f".{_OFFICIAL}") and rest.endswith(":443"):
        return True
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
