"""Images of prompts beside the records."""

import json
import os

import numpy as np
from PIL import Image
from sampled import sample
from scripted import Prompts

from lenvm_lightning.rollouts.generators.interface import Prompt
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
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2
    for rollout in rollouts:
        assert rollout.images[0] == rollout.images[3]
        assert not os.path.isabs(json.loads(lines[0])["images"][1])
        modes = []
        for given, stored in zip(images, rollout.images, strict=True):
            expected = Image.open(given) if isinstance(given, str) else given
            with Image.open(stored) as found:
                modes.append(found.mode)
                assert np.array_equal(np.asarray(found.convert("RGBA")), np.asarray(expected.convert("RGBA")))
        assert modes == ["RGB", "RGB", "RGBA", "RGB"]
