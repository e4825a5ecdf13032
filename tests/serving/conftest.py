"""One server of the tiny world for all tests that change nothing in it."""

import pytest
from served import generator_of, serving


@pytest.fixture(scope="session")
def tiny_server():
    with serving(generator_of()) as server:
        yield server
