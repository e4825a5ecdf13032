import pytest
from transformers import AutoTokenizer

from lenvm_lightning import tinyworld


@pytest.fixture(scope="session")
def tokenizer():
    """Return the shipped tokenizer as a user loads it."""
    return AutoTokenizer.from_pretrained(tinyworld.path("tiny-text"))
