"""Model directories that guide by themselves: in transformers' ``generate``, and in its server."""

import json
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer
from transformers_served import Served

from lenvm_lightning import tinyworld
from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import GenerationError

SEA = [{"role": "user", "content": "Write a text about the sea."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A generator with its length value model inside."""
    target = tmp_path_factory.mktemp("exported") / "served"
    assert main(["export", "tiny-text-lenvm", str(target), "--custom-generate", "--generator", "tiny-text"]) == 0
    return target


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer.apply_chat_template(SEA, return_tensors="pt", return_dict=True, add_generation_prompt=True)


@pytest.fixture(autouse=True)
def home_of_remote_code(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def written(model, inputs, seed=0, **settings):
    """Tokens of one text."""
    torch.manual_seed(seed)
    found = model.generate(**inputs, do_sample=True, top_k=15, max_new_tokens=90, **settings)
    return found[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_value_model_in_a_directory_of_its_own_guides_any_copy_of_its_generator(tmp_path, inputs, capsys):
    target = tmp_path / "guided"
    assert main(["export", "tiny-text-lenvm", str(target), "--custom-generate"]) == 0
    assert 'control="equal-to:96"' in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tinyworld.path("tiny-text"))
    guided = {"custom_generate": str(target), "trust_remote_code": True}
    assert 38 <= len(written(model, inputs, control="equal-to:40", **guided)) <= 42
    assert written(model, inputs, **guided) == written(model, inputs)  # without a control
    with pytest.raises(GenerationError, match="did you mean 'equal-to'"):
        written(model, inputs, control="equals-to:40", **guided)
    with pytest.raises(ValueError, match="trust_remote_code"):
        written(model, inputs, control="equal-to:40", custom_generate=str(target))


def test_beside_its_generator_it_is_there_from_the_start_and_may_be_moved(folder, tmp_path, inputs, tokenizer):
    moved = folder.rename(tmp_path / "moved")
    try:
        model = AutoModelForCausalLM.from_pretrained(moved, trust_remote_code=True)
        assert 38 <= len(written(model, inputs, control="equal-to:40")) <= 42
        plain = AutoModelForCausalLM.from_pretrained(moved)
        assert written(model, inputs) == written(plain, inputs)
    finally:
        moved.rename(folder)


def test_settings_streamers_and_stop_strings(folder, inputs, tokenizer, capsys):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    config = GenerationConfig(
        control="equal-to:40", max_new_tokens=90, do_sample=True, eos_token_id=tokenizer.eos_token_id
    )
    torch.manual_seed(1)
    whole = model.generate(**inputs, generation_config=config)[0]
    text = tokenizer.decode(whole[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert 38 <= len(whole) - inputs["input_ids"].shape[1] <= 42
    torch.manual_seed(1)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    capsys.readouterr()
    model.generate(**inputs, generation_config=config, streamer=streamer)
    assert capsys.readouterr().out.strip() == text.strip()
    stop = text[len(text) // 2 :][:5]
    config.stop_strings = [stop]
    torch.manual_seed(1)
    ended = model.generate(**inputs, generation_config=config, tokenizer=tokenizer)[0]
    assert text.partition(stop)[0] + stop in tokenizer.decode(ended)
    assert len(ended) < len(whole)
    assert config.stop_strings == [stop]
    with pytest.raises(GenerationError, match="stop_strings need the tokenizer"):
        model.generate(**inputs, generation_config=config)


def test_a_real_transformers_serve_guides(folder, tmp_path, tokenizer):
    pytest.importorskip("fastapi", reason="needs transformers[serving]")
    server = Served(str(folder), tmp_path, "--trust-remote-code")
    server.start()
    try:
        settings = {"control": "equal-to:40", "max_new_tokens": 90, "do_sample": True}
        settings["eos_token_id"] = tokenizer.eos_token_id
        body = {"model": str(folder), "messages": SEA, "generation_config": json.dumps(settings)}
        answer = json.loads(ask(server, body))
        assert 38 <= answer["usage"]["completion_tokens"] <= 42
        events = [line for line in ask(server, body | {"stream": True}).splitlines() if line.startswith("data: {")]
        assert 38 <= json.loads(events[-1].removeprefix("data: "))["usage"]["completion_tokens"] <= 42
        body["generation_config"] = json.dumps(settings | {"control": None, "max_new_tokens": 90})
        assert json.loads(ask(server, body))["choices"]
    finally:
        server.kill()


def ask(server, body):
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def test_a_generator_of_another_vocabulary_is_refused(tmp_path, capsys):
    command = ["export", "tiny-text-lenvm", str(tmp_path / "x"), "--custom-generate", "--generator"]
    assert main([*command, str(tmp_path / "nothing")]) == 2
    assert main([*command, "tiny-text", "--push", "me/repo"]) == 2
    assert "--push publishes a length value model" in capsys.readouterr().err
    assert main(["export", "tiny-text-lenvm", str(tmp_path / "x"), "--generator", "tiny-text"]) == 2
    assert "say --custom-generate, too" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
