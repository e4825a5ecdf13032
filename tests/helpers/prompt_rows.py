"""Rows that hold prompts, and what comes of them."""

import datasets
from PIL import Image


def texts(prompts):
    return [prompt.messages[-1]["content"] for prompt in prompts]


def make_image(color="red", size=(6, 4)):
    return Image.new("RGB", size, color)


ROWS = [{"text": f"Question {i}", "key": f"k{i}", "kind": i % 2} for i in range(6)]


def as_parquet(folder):
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "train.parquet")
    return folder
