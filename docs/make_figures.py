"""Draw the figure of the README: tokens still to come along texts of the tiny world, as predicted and as they were.

    python docs/make_figures.py        # writes docs/img/remaining.png

The texts are what the embedded generator answers to one held-out question, with the seeds 0, 1, 2: none was chosen for
its looks, the question was.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from lenvm_lightning import LengthValueModel, generate, tinyworld
from lenvm_lightning.tinyworld.prompt_sets import PromptSet

QUESTION = 3  # of the held-out stories; it asks for every step in detail, so that answers are long enough to look at
TEXTS = 3
DPI = 110  # wide enough for a page of text
COLOURS = 32  # of the palette: three lines and their edges need no more, and the file stays under 60 kB


def remaining_along_texts() -> list[list[float]]:
    """Predicted tokens still to come before each token of each text; the truth falls from its length to 1."""
    folder = tinyworld.path("tiny-text")
    generator = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoProcessor.from_pretrained(folder)
    lenvm = LengthValueModel.from_pretrained("tiny-text-lenvm").eval()
    messages = PromptSet("tiny-math", "test", QUESTION + 1)[QUESTION].messages
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    prompt = list(encoded["input_ids"])
    texts = []
    for completion in generate(generator, None, [prompt], n=TEXTS, top_k=0, top_p=1.0):
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.inference_mode():
            predicted = lenvm.remaining(lenvm(input_ids=ids))[0]
        first = len(prompt) - 1  # the state after the last token of the prompt
        texts.append(predicted[first : first + len(completion.token_ids)].tolist())
    return texts


def draw(texts: list[list[float]], path: Path) -> None:
    """Write the figure."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for number, predicted in enumerate(texts):
        length = len(predicted)
        axes.plot(
            [0, length], [length, 0], linestyle="--", linewidth=1, color="0.6", label="true" if not number else None
        )
        axes.plot(range(length), predicted, linewidth=1.6, label=f"predicted, a text of {length} tokens")
    axes.set(xlabel="tokens written", ylabel="tokens still to come", xlim=(0, None), ylim=(0, None))
    axes.set_title("tiny world: three answers to one question", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(COLOURS)
    small.save(path, optimize=True)


if __name__ == "__main__":
    target = Path(__file__).parent / "img" / "remaining.png"
    target.parent.mkdir(exist_ok=True)
    draw(remaining_along_texts(), target)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")
