"""Who is there: the address of a server, what kind it is, which model it serves."""

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import openai

from ....errors import GeneratorError
from .backends import Backend, find_backend
from .retry_policy import classify


def addresses(url: str) -> tuple[str, str]:
    """The address for requests, and the one for messages, without user and password.

    Raises:
        GeneratorError: it is no address.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise GeneratorError(f"{url!r} is no address of a server; one looks like http://localhost:8000")
    parts = parts._replace(path=parts.path.rstrip("/") or "/v1")
    return urlunsplit(parts), urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))


def find_model(
    client: openai.OpenAI,
    address: str,
    model: str | None,
    server: str,
    *,
    key_env: str,
    hide: Callable[[str], str],
) -> tuple[str, Backend]:
    """Ask a server which model it serves and what kind of server it is.

    Args:
        client: of the server.
        address: of the server, for messages.
        model: the one to use; the only one that it lists where None.
        server: a kind of server, or ``auto``.
        key_env: environment variable of the key, for messages.
        hide: takes secrets out of texts.

    Raises:
        GeneratorError: no server there, the key refused, no model or several.
    """
    try:
        listed: list[Any] | None = list(client.models.list().data or [])
    except openai.APIConnectionError as error:
        reason = hide(classify(error).reason)
        raise GeneratorError(f"no server answers at {address} ({reason}). Start it, or check the address.") from None
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise GeneratorError(f"{address} refuses the key in ${key_env} ({hide(classify(error).reason)})") from None
    except (openai.APIError, ValueError, AttributeError):  # `transformers serve` without a cache folder: 500
        listed = None
    owners = [str(getattr(card, "owned_by", "")) for card in listed or []]
    host = urlsplit(str(client.base_url)).hostname or ""
    backend = find_backend(server, host, owners, lambda: _served_paths(client))
    if model is not None:
        return model, backend
    names = [str(card.id) for card in listed or []]
    if backend.name == "transformers":  # its list is that of the cache folder, not of what it serves
        names = []
    if len(names) == 1:
        return names[0], backend
    found = f"lists {len(names)}: {', '.join(names[:20])}" if names else "does not say which one it serves"
    raise GeneratorError(f"which model? {address} {found}. Name it: model=... (--model, --sample.model)")


def _served_paths(client: openai.OpenAI) -> set[str]:
    """Paths in the description of itself that a FastAPI server gives; none where there is no such thing."""
    root = str(client.base_url).rstrip("/").removesuffix("/v1")
    try:
        # Tried again, for uvicorn hangs up after the error that the list of models may have been.
        described: Any = client.with_options(base_url=root, max_retries=2).get("/openapi.json", cast_to=object)
        return set(described["paths"])
    except (openai.APIError, ValueError, KeyError, TypeError):
        return set()
