"""A control of your own: write freely for N tokens, then come to an end.

A control is a pure function, called once a step for all rows of a batch:

    control(probs, remaining, generated, gamma) -> probs

It may use other controls. This one leaves the first N tokens to the generator, so that a shorter text is the very text
it would have been, and tilts what comes after towards its end, which still closes with a sentence. Run it:

    python examples/custom_control.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor

from lenvm_lightning import LengthValueModel, Tilt, generate, tinyworld


@dataclass(frozen=True)
class ComeToAnEnd:
    """The base model for `n` tokens, then a tilt.

    Args:
        n: tokens that are left alone.
        beta: of the tilt after them; below 0 shortens.
    """

    n: int
    beta: float = -100.0

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to sample from.

        Args:
            probs: of the candidates. Shape (B, K).
            remaining: tokens that would follow each candidate; 0 after an end. Shape (B, K).
            generated: tokens written before this one. Shape (B,).
            gamma: of the length value model.
        """
        tilted = Tilt(self.beta)(probs, remaining, generated, gamma)
        return torch.where(generated[:, None] < self.n, probs, tilted)


def main() -> None:
    """Write the same texts with and without the control, and say how long they are."""
    folder = tinyworld.path("tiny-text")
    generator = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoProcessor.from_pretrained(folder)
    lenvm = LengthValueModel.from_pretrained("tiny-text-lenvm").eval()
    messages = [{"role": "user", "content": "Write a text about the sea."}]
    prompt = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    for control in (None, ComeToAnEnd(64)):
        completions = generate(generator, lenvm, [prompt], control=control, n=8, max_tokens=512)
        print(f"{control}: {[len(completion.token_ids) for completion in completions]} tokens")
    print(tokenizer.decode(completions[0].token_ids, skip_special_tokens=True))


if __name__ == "__main__":
    main()
