"""The figure of the README: the tokens still to come, predicted at every token of a text, beside the truth.

    python docs/make_figures.py                 # seconds on one CPU core; writes docs/img/remaining.png

The text is the longest of the answers to the first six held-out stories of the tiny world: the other five are shorter
and look alike. Nothing else is chosen. Tokens are sampled at temperature 1 with `generate`'s other defaults.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenvm_lightning import LengthValueModel, stream, tinyworld
from lenvm_lightning.evaluation.plots import as_png, new_figure
from lenvm_lightning.rollouts.prompts import load_prompts

OUT = Path(__file__).parent / "img" / "remaining.png"
STORIES = 6


def main() -> None:
    """Write the figure."""
    torch.set_num_threads(1)  # small models are fastest with one
    folder = tinyworld.path("tiny-text")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = AutoModelForCausalLM.from_pretrained(folder).eval()
    lenvm = LengthValueModel.from_pretrained("tiny-text-lenvm")

    # 1. Write an answer to each story, unguided, and keep what the value model says after every token.
    answers = []
    for prompt in load_prompts("tiny-math", split="test", limit=STORIES):
        inputs = tokenizer.apply_chat_template(
            prompt.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answers.append(list(stream(generator, lenvm, inputs, seed=0)))
    tokens = max(answers, key=len)

    # 2. The truth after token t of T, the end token included, is T - t.
    total = len(tokens)
    written = range(1, total + 1)
    truth = [total - number for number in written]
    predicted = [token.remaining for token in tokens]

    # 3. Say on the axis where the text breaks off into a new paragraph.
    breaks = [number for number, token in zip(written, tokens, strict=True) if "\n" in tokenizer.decode(token.token_id)]
    figure, axis = new_figure(width=7.2, height=3.0)
    axis.plot(written, truth, color="0.55", linestyle="--", label="truth, known only in the end")
    axis.plot(written, predicted, color="tab:blue", label="predicted after each token")
    for place in breaks:
        axis.axvline(place, color="0.85", linewidth=0.8)
    axis.set(
        xlabel="tokens written (thin lines: line breaks)",
        ylabel="tokens still to come",
        title="Tiny world: an answer as it is written",
        xlim=(0, total),
        ylim=(0, None),
    )
    axis.legend(frameon=False)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_bytes(as_png(figure))
    print(f"{OUT}: {OUT.stat().st_size / 1024:.0f} KiB, {total} tokens")


if __name__ == "__main__":
    main()
