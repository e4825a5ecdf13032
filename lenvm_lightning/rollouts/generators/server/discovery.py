"""Who is there: what kind a server is, which model it serves."""

from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import openai

from ....errors import GeneratorError
from ....utils.foreign_text import as_shown
from .backends import Backend, find_backend
from .client import Address, Credentials, answered
from .event_loop import EventLoopThread
from .reply import Description, ModelList, Reply, UnusableResponse, read_reply
from .retry_policy import classify, describe_fatal

OpenClient = Callable[[], openai.AsyncOpenAI]
_TRIES = 3  # uvicorn hangs up after the error that the list of models may have been
_LONGEST_NAME = 300  # characters of a model's name; some are paths

Kind = TypeVar("Kind", bound=Reply)


def find_model(
    open_client: OpenClient, address: Address, credentials: Credentials, model: str | None, server: str
) -> tuple[str, Backend]:
    """Ask a server which model it serves and what kind of server it is.

    Args:
        open_client: makes a client of the server.
        address: of the server, for messages.
        credentials: that go along, to be hidden.
        model: the one to use; the only one that it lists where None.
        server: a kind of server, or ``auto``.

    Raises:
        GeneratorError: no server there, the key refused, no model or several.
    """
    listed, why = _list_models(open_client, address, credentials)
    owners = [card.owned_by or "" for card in (listed.data if listed else None) or []]
    host = urlsplit(address.url).hostname or ""
    backend = find_backend(server, host, owners, lambda: _served_paths(open_client, address))
    if model is not None:
        return model, backend
    names = [card.id for card in (listed.data if listed else None) or []]
    if backend.name == "transformers":  # its list is that of the cache folder, not of what it serves
        names = []
    if len(names) == 1:
        return _usable(names[0]), backend
    shown = ", ".join(as_shown(name, 100) for name in names[:20])
    found = f"lists {len(names)}: {shown}" if names else f"does not say which one it serves{why}"
    raise GeneratorError(f"which model? {address.shown} {found}. Name it: model=... (--model, --sample.model)")


def _usable(name: str) -> str:
    """The name that a server gives its model; it goes into requests, records and reports as it is.

    Raises:
        GeneratorError: it would do harm there.
    """
    if not name.isprintable() or not 0 < len(name.strip()) <= len(name) <= _LONGEST_NAME:
        raise GeneratorError(
            f"the server's model is called {as_shown(name, 100)!r}, which is no name: it must have 1 to "
            f"{_LONGEST_NAME} characters that can be printed. Name the model yourself: model=... (--model)"
        )
    return name


def _list_models(open_client: OpenClient, address: Address, credentials: Credentials) -> tuple[ModelList | None, str]:
    """The models that a server lists; None where it has no list, and why that is."""
    try:
        return _get(open_client, "/models", ModelList), ""
    except openai.APIConnectionError as error:
        reason = classify(error, credentials.hide).reason
        raise GeneratorError(
            f"no server answers at {address.shown} ({reason}). Start it, or check the address."
        ) from None
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        reason = classify(error, credentials.hide).reason
        sent = f"the key in ${credentials.key_env}" if credentials.key_env else "requests without a key"
        raise GeneratorError(f"{address.shown} refuses {sent} ({reason})") from None
    except (openai.OpenAIError, UnusableResponse) as error:  # `transformers serve` without a cache folder: 500
        failed = classify(error, credentials.hide)
        if isinstance(error, openai.APIStatusError) and error.status_code < 400:
            raise GeneratorError(describe_fatal(failed.reason)) from None
        return None, f" ({failed.reason})"


def _served_paths(open_client: OpenClient, address: Address) -> set[str]:
    """Paths in the description of itself that a FastAPI server gives; none where there is no such thing."""
    place = address.url.partition("?")[0].removesuffix("/v1") + "/openapi.json"
    for _ in range(_TRIES):
        try:
            return set(_get(open_client, place, Description).paths)
        except openai.APIConnectionError:
            continue
        except (openai.OpenAIError, UnusableResponse):
            break
    return set()


def _get(open_client: OpenClient, place: str, kind: type[Kind]) -> Kind:
    """Ask a server for something, whether or not an event loop runs here.

    Raises:
        openai.OpenAIError: it did not answer, or refused.
        UnusableResponse: it sent something else.
    """

    async def ask(client: openai.AsyncOpenAI, _: None) -> bytes:
        return await answered(client.get(place, cast_to=bytes))

    [content] = EventLoopThread(iter([None]), 1, open_client, ask).results()
    return read_reply(kind, content)
