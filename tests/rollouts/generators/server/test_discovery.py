"""Finding the server and the model."""

import pytest
from scripted_server import Response, generator, models

from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.rollouts.generators.server import ServerGenerator


def test_the_only_model_is_taken_and_signs_the_fingerprint(server):
    made = generator(server, model=None, server="auto")
    assert made.name == "m"
    assert made.fingerprint() == {"kind": "server", "name": "m"}
    assert ServerGenerator(server.url + "/v1/", processor="tiny-text").name == "m"


def test_one_of_several_models_has_to_be_named(server):
    server.pages["/v1/models"] = models(("a", "vllm"), ("b", "vllm"))
    with pytest.raises(GeneratorError, match=r"which model.* lists 2: a, b.*model="):
        generator(server, model=None, server="auto")
    server.pages["/v1/models"] = Response(b"Internal Server Error", 500)
    with pytest.raises(GeneratorError, match=r"does not say which one it serves.*model="):
        generator(server, model=None, server="auto")


def test_mistakes_in_settings_are_named(server):
    with pytest.raises(GeneratorError, match="unknown kind of server 'vlm'; did you mean 'vllm'"):
        generator(server, server="vlm")
    with pytest.raises(GeneratorError, match="concurrency must lie between 1 and 1000, found 0"):
        generator(server, concurrency=0)
    with pytest.raises(GeneratorError, match="is no address"):
        ServerGenerator("ftp://x", "m")


def test_a_refused_key_is_said_before_anything_is_sampled(server):
    server.pages["/v1/models"] = Response({"error": {"message": "who are you?"}}, 401)
    with pytest.raises(GeneratorError, match=r"refuses the key in \$OPENAI_API_KEY \(401: who are you\?\)"):
        generator(server, model=None, server="auto")
