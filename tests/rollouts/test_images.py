"""Images of prompts beside the records."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from sampled import sample
from scripted import Prompts

from lenvm_lightning.errors import DataError
from lenvm_lightning.rollouts.generators.interface import Prompt
from lenvm_lightning.rollouts.images import save_image
from lenvm_lightning.rollouts.record import parse_record


def test_images_are_written_once_and_found_again(tmp_path):
    (tmp_path / "given").mkdir()
    path = tmp_path / "given" / "a.png"
    Image.new("RGB", (4, 4), (1, 2, 3)).save(path)
    see_through = Image.new("P", (5, 5), 0)
    see_through.info["transparency"] = 0
    images = (Image.new("RGB", (6, 6), (9, 8, 7)), str(path), see_through, Image.new("RGB", (6, 6), (9, 8, 7)))
    prompts = Prompts([Prompt("p", [{"role": "user", "content": "<image>" * 4}], images)])
    outcome = sample(tmp_path / "out", prompts=prompts)
    lines = outcome.rollouts.read_text().splitlines()
    rollouts = [parse_record(json.loads(line), outcome.folder)[0][0] for line in lines]
    assert len(list((tmp_path / "out" / "images").iterdir())) == 3
    for rollout in rollouts:
        assert rollout.images[0] == rollout.images[3]
        assert all(path.startswith("images/") for path in json.loads(lines[0])["images"])
        modes = []
        for given, stored in zip(images, rollout.images, strict=True):
            expected = Image.open(given) if isinstance(given, str) else given
            with Image.open(stored) as found:
                modes.append(found.mode)
                assert np.array_equal(np.asarray(found.convert("RGBA")), np.asarray(expected.convert("RGBA")))
        assert modes == ["RGB", "RGB", "RGBA", "RGB"]


def test_files_beside_the_records_stay_where_they_are_and_others_are_copied(tmp_path):
    (tmp_path / "out").mkdir()
    for file in (tmp_path / "a.png", tmp_path / "b.verylongending", tmp_path / "out" / "c.png"):
        Image.new("RGB", (2, 2), "red" if file.name == "c.png" else "blue").save(file, "PNG")
    os.symlink(tmp_path / "a.png", tmp_path / "out" / "link.png")
    found = [
        save_image(str(tmp_path / name), tmp_path / "out")
        for name in ("a.png", "b.verylongending", "out/c.png", "out/link.png")
    ]
    assert found[2] == "c.png"
    assert found[0] == found[3] == f"{found[1]}.png"
    for path in found[:2]:
        assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "a.png").read_bytes()
    with pytest.raises(DataError, match=r"gone\.png was there when the prompts were read"):
        save_image(str(tmp_path / "gone.png"), tmp_path / "out")


def test_16_bits_are_stored_as_they_were_seen(tmp_path):
    path = save_image(Image.fromarray(np.array([[0, 25_700, 65_535]], dtype=np.uint16)), tmp_path)
    with Image.open(tmp_path / path) as stored:
        assert np.asarray(stored).tolist() == [[0, 100, 255]]
