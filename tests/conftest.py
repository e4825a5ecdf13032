import gc
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch

# Everything else is imported by the fixtures that need it: the tests of the maths need torch alone, and start at once.


def pytest_collection_finish(session):
    """Let no search for garbage go through millions of imported objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _alone(tmp_path_factory):
    """One thread, and a cache of our own."""
    torch.set_num_threads(1)
    # Started in the background of a shell, Python ignores Ctrl-C; what it does here is part of what is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LENVM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_text():
    from lenvm_lightning.models.processors import load_processor

    return load_processor("tiny-text")


@pytest.fixture(scope="session")
def tiny_vl():
    from lenvm_lightning.models.processors import load_processor

    return load_processor("tiny-vl")


@pytest.fixture(scope="session")
def text_rollouts(tmp_path_factory):
    from lenvm_lightning.tinyworld.rollouts import write_rollouts

    return write_rollouts("text", tmp_path_factory.mktemp("text"), prompts=20, completions=2)


@pytest.fixture(scope="session")
def vision_rollouts(tmp_path_factory):
    from lenvm_lightning.tinyworld.rollouts import write_rollouts

    return write_rollouts("vision", tmp_path_factory.mktemp("vision"), prompts=20, completions=2)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of its own, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hugging Face hub on this machine in place of the real one; see `fake_hub.Hub`."""
    from fake_hub import reached_hub

    with reached_hub(monkeypatch, tmp_path / "cache-of-the-hub") as found:
        yield found
