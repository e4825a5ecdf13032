import pytest
from sampled import sample


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> bytes:
    """The final file of an undisturbed run of the scripted generator."""
    return sample(tmp_path_factory.mktemp("whole")).rollouts.read_bytes()
