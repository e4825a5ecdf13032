from pathlib import Path

import pytest

from lenvm_lightning import tinyworld
from lenvm_lightning.models import embedded
from lenvm_lightning.models.embedded import EmbeddedModel


def test_the_tiny_world_is_known_by_its_names():
    assert embedded.generators() == tinyworld.NAMES
    assert embedded.value_models() == tuple(tinyworld.VALUE_MODELS)
    for name in (*tinyworld.NAMES, *tinyworld.VALUE_MODELS):
        assert embedded.is_embedded(name)
        assert embedded.folder(name) == tinyworld.path(name)
        assert embedded.notice(name) == tinyworld.NOTICE
    assert embedded.value_model_of("tiny-vl") == "tiny-vl-lenvm"


def test_who_wrote_a_completion():
    assert all(map(embedded.wrote, (*tinyworld.NAMES, "tinyworld-script")))
    assert embedded.notice("tinyworld-script") == tinyworld.NOTICE
    assert not embedded.wrote("tiny-text-lenvm")  # it writes nothing
    assert not embedded.wrote("Qwen/Qwen2.5-3B-Instruct")
    assert embedded.notice("Qwen/Qwen2.5-3B-Instruct") is None
    assert embedded.value_model_of("Qwen/Qwen2.5-3B-Instruct") is None


def test_an_unknown_name_is_refused_with_those_there_are():
    assert not embedded.is_embedded("tiny-audio")
    with pytest.raises(ValueError, match="tiny-text, tiny-vl, tiny-text-lenvm"):
        embedded.folder("tiny-audio")


def test_a_name_is_given_once_and_a_value_model_has_a_generator(monkeypatch):
    monkeypatch.setattr(embedded, "_models", dict(embedded._models))
    with pytest.raises(ValueError, match="already"):
        embedded.register(EmbeddedModel("tiny-text", Path("elsewhere"), "other"))
    with pytest.raises(ValueError, match="not registered"):
        embedded.register(EmbeddedModel("huge-lenvm", Path("elsewhere"), "other", generator="huge"))
    assert not embedded.is_embedded("huge-lenvm")
    embedded.register(EmbeddedModel("huge", Path("elsewhere"), "other"))
    assert embedded.generators() == (*tinyworld.NAMES, "huge")
