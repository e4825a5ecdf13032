"""What lines of rollout files are made of."""

import json

from PIL import Image

USER = [{"role": "user", "content": "Add 3 and 4, please."}]
SEEN = [{"role": "user", "content": "<image>How many?"}]


def draw(path, size=(84, 84)):
    Image.new("RGB", size, "red").save(path)


def line(prompt, split=None, **more):
    record = {"prompt_id": prompt, "messages": [{"role": "user", "content": f"Say {prompt}."}], "completion": "Yes."}
    return json.dumps({**record, **({"split": split} if split else {}), **more}) + "\n"
