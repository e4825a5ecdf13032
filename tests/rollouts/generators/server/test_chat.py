"""Images in messages, as servers take them."""

import base64
import io

from PIL import Image
from scripted_server import SAMPLING, generator

from lenvm_lightning.rollouts.generators.interface import GeneratedText, Prompt, PromptRequest


def test_images_stand_at_their_marks(server, tmp_path):
    red, blue = Image.new("RGB", (5, 4), "red"), Image.new("RGB", (3, 2), "blue")
    blue.save(tmp_path / "blue.png")
    prompt = Prompt(
        "p",
        [{"role": "system", "content": "Look."}, {"role": "user", "content": "<image>and <image>: same?"}],
        images=(red, str(tmp_path / "blue.png")),
    )
    answers = list(generator(server).sample([PromptRequest(prompt, (0, 1))], SAMPLING))
    assert len(answers) == 2
    system, user = server.bodies[0]["messages"]
    assert system == {"role": "system", "content": "Look."}
    assert [part["type"] for part in user["content"]] == ["image_url", "text", "image_url", "text"]
    assert [part["text"] for part in user["content"] if "text" in part] == ["and ", ": same?"]
    for part, image in zip(user["content"][::2], (red, blue), strict=True):
        kind, _, content = part["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        shown = Image.open(io.BytesIO(base64.b64decode(content)))
        assert (shown.format, shown.size, shown.tobytes()) == ("PNG", image.size, image.tobytes())


def test_an_image_that_cannot_be_shown_stops_only_its_own_prompt(server, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    content = [{"role": "user", "content": "<image>?"}]
    bad = [
        Prompt("gone", content, (str(tmp_path / "gone.png"),)),
        Prompt("torn", content, (str(tmp_path / "torn.png"),)),
        Prompt("none", content),
        Prompt("good", content, (Image.new("L", (2, 2)),)),
    ]
    answers = generator(server).sample([PromptRequest(prompt, (0,)) for prompt in bad], SAMPLING)
    results = {answer.prompt_id: answer.result for answer in answers}
    assert isinstance(results.pop("good"), GeneratedText)
    assert all(failure.final for failure in results.values())
    assert "gone.png does not exist" in results["gone"].reason
    assert "torn.png cannot be read" in results["torn"].reason
    assert results["none"].reason == "1 <image> marks in the prompt but 0 images"
