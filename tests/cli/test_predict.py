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
