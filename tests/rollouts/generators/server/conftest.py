import pytest
from scripted_server import ScriptedServer


@pytest.fixture
def server():
    server = ScriptedServer()
    yield server
    server.stop()
