"""`lenvm predict` as people type it."""

import json

from PIL import Image

from lenvm_lightning.cli.main import main
from lenvm_lightning.tinyworld.prompt_sets import prompt_set

SEA = "Write a text about the sea. The text must be equal to {} tokens long."


def test_predict(capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt_id": "short", "messages": [{"role": "user", "content": SEA.format(16)}]},
        {"prompt_id": "long", "messages": [{"role": "user", "content": SEA.format(256)}]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["predict", str(file)]) == 0
    found = {
        row["prompt_id"].rpartition("/")[2]: row["expected_tokens"]
        for row in map(json.loads, capsys.readouterr().out.splitlines())
    }
    assert found["short"] < 60 < found["long"]


def test_images_elsewhere_need_a_flag(capsys, here):
    (here / "data").mkdir()
    Image.new("RGB", (28, 28)).save(here / "a.png")
    row = {"prompt": "<image>How many?", "image": "../a.png"}
    (here / "data" / "p.jsonl").write_text(json.dumps(row) + "\n")
    command = ["predict", "data/p.jsonl", "--generator", "tiny-vl"]
    assert main(command) == 2
    assert "p.jsonl:1: image ../a.png is " in capsys.readouterr().err
    assert main([*command, "--allow-images-from", str(here)]) == 0


def test_predict_of_pictures_needs_a_model_that_sees(capsys):
    assert main(["predict", "tiny-vqa", "--limit", "2", "--lenvm", "tiny-text-lenvm", "--generator", "tiny-vl"]) == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["error"] for row in rows] == ["the prompt has images, but the length value model reads text only"] * 2


def test_predict_from_pictures_agrees_with_generation(capsys):
    assert main(["predict", "tiny-vqa", "--limit", "3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt_id"] for row in rows] == [prompt.prompt_id for prompt in prompt_set("tiny-vqa", None, 3)]
    assert all(5 < row["expected_tokens"] < 400 for row in rows)


def test_the_embedded_models_say_how_sure_they_are(capsys):
    for prompts in ("tiny-math", "tiny-vqa"):
        assert main(["predict", prompts, "--limit", "4", "--quantiles", ".1,.5,.9"]) == 0
        for row in map(json.loads, capsys.readouterr().out.splitlines()):
            low, middle, high = row["quantiles"].values()
            assert 0 <= low < middle < high
            assert low < row["expected_tokens"] < high


def test_requests_for_schedulers(capsys):
    assert main(["predict", "tiny-math", "--limit", "3"]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    words = ["predict", "tiny-math", "--limit", "3", "--served-model", "mine", "--format"]
    for engine in ("vllm", "dynamo"):
        assert main([*words, engine]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["custom_id"] for line in lines] == [line["prompt_id"] for line in expected]
        for line, known in zip(lines, expected, strict=True):
            assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
            assert line["body"]["model"] == "mine"
            assert line["body"]["messages"][0]["role"] == "user"
            tokens = line["body"]["priority"] if engine == "vllm" else line["body"]["nvext"]["agent_hints"]["osl"]
            assert isinstance(tokens, int)
            assert abs(tokens - known["expected_tokens"]) <= 0.6


def test_requests_carry_images(capsys):
    words = ["predict", "tiny-vqa", "--limit", "1", "--format", "vllm", "--served-model", "mine"]
    assert main(words) == 0
    [line] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    parts = line["body"]["messages"][0]["content"]
    assert any(part["type"] == "image_url" for part in parts)
    # Nothing but requests on stdout, which goes to a file.
    assert main([*words, "--lenvm", "tiny-text-lenvm", "--generator", "tiny-vl"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "reads text only" in err


def test_a_request_needs_the_name_of_the_model(capsys):
    for words in (["--format", "vllm"], ["--served-model", "mine"]):
        assert main(["predict", "tiny-math", *words]) == 2
        assert "need --served-model" in capsys.readouterr().err
