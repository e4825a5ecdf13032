"""Options of a server, as people write them."""

import pytest
from scripted_server import generator

from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.rollouts.generators.server.options import require_options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 5), ("model", ""), ("processor", ["x"]), ("server", None), ("concurrency", "64"), ("concurrency", 0),
        ("concurrency", True), ("concurrency", 1001), ("concurrency", 1.5), ("retries", -1), ("retries", "many"),
        ("backoff", -0.1), ("backoff", None), ("unreachable_timeout", float("nan")), ("timeout", 0),
        ("timeout", float("inf")), ("timeout", 10**400), ("logprobs", "yes"), ("api_key_env", None), ("seeds", 0),
        ("api_key_env", "A=B"), ("api_key_env", "A\0B"), ("api_key_env", "\x1b[31m"), ("gamma", "0.9"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_named(name, value):
    with pytest.raises(GeneratorError, match=f"^{name} must .*, found ") as error:
        require_options(**{name: value})
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_all_of_them_are_named_at_once_before_anybody_is_asked(server):
    with pytest.raises(GeneratorError, match="concurrency must lie between 1 and 1000, found 0; retries must be"):
        generator(server, concurrency=0, retries=-1)
    assert server.seen_headers == []
