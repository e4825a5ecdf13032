"""`lenvm generate` as people type it, on the models that ship with the package."""

import io
import json
import shutil

import pytest

from lenvm_lightning import tinyworld
from lenvm_lightning.cli.main import main
from lenvm_lightning.tinyworld.prompt_sets import prompt_set

SEA = "Write a text about the sea. The text must be equal to 96 tokens long."


def test_a_target_length_comes_out(capsys, tiny_text):
    assert main(["generate", "--equal-to", "96", SEA]) == 0
    out, err = capsys.readouterr()
    written = len(tiny_text(out.rstrip("\n"))["input_ids"]) + 1
    assert abs(written - 96) <= 10
    assert f"{written} tokens under EqualTo(n=96" in err
    assert "expected after the first" in err
    assert "tiny world" in err


def test_a_prompt_that_the_chat_template_refuses(capsys, tmp_path):
    shutil.copytree(tinyworld.path("tiny-text"), tmp_path / "strict")
    (tmp_path / "strict" / "chat_template.jinja").write_text("{{ raise_exception('no questions, please') }}")
    assert main(["generate", "--generator", str(tmp_path / "strict"), "What?"]) == 2
    assert "the chat template refuses the prompt: no questions, please" in capsys.readouterr().err


def test_several_completions_of_a_prompt_from_stdin_and_a_trace(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO(SEA))
    trace = tmp_path / "trace.jsonl"
    assert main(["generate", "--at-most", "60", "-n", "3", "--trace", str(trace), "--stop", "Second"]) == 0
    out, err = capsys.readouterr()
    assert err.count("tokens under AtMost(n=60") == 3
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    assert {step["completion"] for step in steps} == {0, 1, 2}
    assert all(-1 <= step["value"] <= 0 <= step["remaining"] for step in steps)
    assert any(len(step["candidates"]) > 1 for step in steps)
    assert "".join(step["text"] for step in steps if step["completion"] == 0).strip().startswith(out[:20].strip())


def test_a_refused_call_leaves_no_trace(capsys, tmp_path):
    trace = tmp_path / "trace.jsonl"
    assert main(["generate", "--at-least", "999999", "--trace", str(trace), "Hello"]) == 2
    assert "pass the context window" in capsys.readouterr().err
    assert not trace.exists()


def test_a_full_disk_is_told_after_the_text(capsys):
    assert main(["generate", "--at-most", "4", "--trace", "/dev/full", "Hello"]) == 2
    out, err = capsys.readouterr()
    assert out.strip()
    assert "--trace: /dev/full cannot be written: No space left" in err


def test_without_a_control_it_is_the_base_model(capsys):
    assert main(["generate", "--seed", "3", SEA]) == 0
    free = capsys.readouterr().out
    assert main(["generate", "--seed", "3", "--tilt", "0", SEA]) == 0
    assert capsys.readouterr().out == free


def test_a_picture(capsys, tmp_path):
    prompt = prompt_set("tiny-vqa", "test", 1)[0]
    prompt.images[0].save(tmp_path / "shapes.png")
    question = prompt.messages[0]["content"].replace("<image>", "")
    assert main(["generate", "--image", str(tmp_path / "shapes.png"), "--tilt", "-10", question]) == 0
    assert "boxed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--equal-to", "0", "Hello"], "--equal-to: n must be a whole number of at least 1 token"),
        (["--equal-to", "9", "--max-tokens", "3", "Hello"], "max_tokens=3 contradict each other"),
        (["--tilt", "nan", "Hello"], "--tilt: beta must be finite"),
        (["--control", "equal-too:9", "Hello"], "did you mean 'equal-to'"),
        ([" "], "PROMPT is empty"),
        (["--image", "missing.png", "Hello"], "--image: image missing.png does not exist"),
        (["--generator", "some/model", "--at-most", "9", "Hello"], "--lenvm is missing"),
        (["--lenvm", "tiny-text", "--at-most", "9", "Hello"], "'tiny-text' has no value head"),
        (["--generator", "tiny-text", "--image", "FILE", "Hello"], "--image: tiny-text reads text only"),
        (["--top-p", "0", "Hello"], "top_p must be above 0"),
        (["--dtype", "flat32", "--at-most", "9", "Hello"], "unknown dtype 'flat32'; did you mean 'float32'?"),
        (["--device", "cuda:77", "--at-most", "9", "Hello"], "there is no device 'cuda:77' here"),
        (["--trace", "/dev/null/trace.jsonl", "--at-most", "9", "Hello"], "--trace: "),
        (["--trace", "/", "--at-most", "9", "Hello"], "--trace: "),
        (["--at-least", "999999", "Hello"], "pass the context window"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, words, capsys, tmp_path):
    if "FILE" in arguments:
        prompt_set("tiny-vqa", "test", 1)[0].images[0].save(tmp_path / "p.png")
        arguments = [str(tmp_path / "p.png") if word == "FILE" else word for word in arguments]
    assert main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""


def test_a_length_value_model_of_another_tokenizer_is_refused(capsys, tmp_path):
    folder = shutil.copytree(tinyworld.path("tiny-text-lenvm"), tmp_path / "other")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = list(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] = dict(zip(words, reversed(list(tokenizer["model"]["vocab"].values())), strict=True))
    file.write_text(json.dumps(tokenizer))
    assert main(["generate", "--lenvm", str(folder), "--at-most", "9", "Hello"]) == 2
    assert "has another tokenizer than the generator" in capsys.readouterr().err


def test_two_controls_at_once_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--equal-to", "9", "--at-most", "9", "Hello"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_control_as_text_is_that_control(capsys):
    said = []
    for words in (["--equal-to", "24"], ["--control", "equal-to:24"]):
        assert main(["generate", *words, "Write a text about the sea."]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_segment_within_its_budget(capsys, tiny_text, tmp_path):
    model = tmp_path / "segments"
    shutil.copytree(tinyworld.path("tiny-text-lenvm"), model)
    config = json.loads((model / "lenvm_config.json").read_text())
    (model / "lenvm_config.json").write_text(json.dumps({**config, "until": "."}))
    asked = ["generate", "Write a text about the sea.", "--seed", "4", "--max-tokens", "40"]
    assert main([*asked, "--lenvm", str(model), "--at-most", "6", "--until", "."]) == 0
    text = capsys.readouterr().out
    assert len(tiny_text(text[: text.index(".") + 1])["input_ids"]) <= 6
    assert main([*asked, "--lenvm", str(model), "--control", "at-most:6:until=."]) == 0
    assert capsys.readouterr().out == text
    assert main([*asked, "--at-most", "6", "--until", "."]) == 2
    assert "train one with" in capsys.readouterr().err
    assert main([*asked, "--tilt", "-5", "--until", "."]) == 2
    assert "--until goes with --equal-to or --at-most" in capsys.readouterr().err
