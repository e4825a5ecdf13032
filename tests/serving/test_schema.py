"""Requests made from the server's own OpenAPI schema, right and wrong ones: none ends in an error of the server."""

import collections

import pytest

pytest.importorskip("schemathesis", reason="needs the extra `dev`")

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from served import generator_of, serving

from lenvm_lightning.serving.service import Limits


@pytest.mark.parametrize("count", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_request_ends_in_an_error_of_the_server(count):
    with serving(generator_of(rows=8), Limits(n=4, max_tokens=32)) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        seen = collections.Counter()
        for found in schema.get_all_operations():
            operation = found.ok()
            modes = [GenerationMode.POSITIVE]
            if operation.method == "post":  # elsewhere there is nothing to get wrong
                modes.append(GenerationMode.NEGATIVE)
            for mode in modes:
                check(operation, mode, count, seen)
        server.wait_until_idle()  # whatever was asked, nothing is left behind
        assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
    assert {status for _, status in seen} >= {200, 400}
    assert all(status < 500 for _, status in seen), seen


def check(operation, mode, count, seen):
    """Ask so many requests of one kind, and count what they were answered with."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def ask(case):
        response = case.call(timeout=60)
        seen[operation.label, response.status_code] += 1
        assert response.status_code < 500, (case, response.text)

    ask()
