"""A control of your own: write as the base model does, and end with the end of a sentence shortly before N tokens.

A control is any callable of this form; it sees all rows of a batch at once and knows nothing of models or texts:

    control(probs, remaining, generated, gamma) -> probs

Where no end is due, this one leaves the generator alone, where `EqualTo(n)` steers from the first token on. In the last
tokens before N it prefers what the value model sees ending soon, and lets the text end only where the generator itself
would: at the end of a sentence. Compare it with a hard budget, which cuts texts off:

    python examples/custom_control.py            # the embedded tiny world, seconds on a CPU
    python examples/custom_control.py --n 96
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenvm_lightning import LengthValueModel, generate, tinyworld

TOPICS = ("sea", "garden", "bridge", "school")


@dataclass(frozen=True)
class EndBefore:
    """End with a sentence, between `n - window` and `n` tokens.

    Args:
        n: tokens, the end included.
        window: tokens before n in which the text is brought to its end.
        finished: least probability that the generator gives the end token where a sentence may end the text.
        strength: nats by which the longest candidate falls behind the shortest, at n.
    """

    n: int
    window: int = 30
    finished: float = 0.05
    strength: float = 60.0

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to sample from.

        Args:
            probs: of the K candidates for each row's next token, 0 where a row has fewer. Shape (B, K).
            remaining: tokens that would follow each candidate; exactly 0 for an end token. Shape (B, K).
            generated: tokens written before this one. Shape (B,).
            gamma: of the length value model.
        """
        # 1. How far each row is into its window: 0 before it, 1 at n.
        left = self.n - generated[:, None]  # tokens, this one among them. (B, 1)
        progress = (1 - left / self.window).clamp(0, 1)  # (B, 1)

        # 2. The nearer to n, the more a long way to the end costs. Before the window exp(0) = 1: the base model.
        longer = 1 - gamma**remaining  # g, in [0, 1). (B, K)
        preferred = probs * torch.exp(-self.strength * progress * longer)

        # 3. An end only within the window, and only where the generator sees a finished sentence.
        is_end = (remaining == 0) & (probs > 0)
        finished = torch.where(is_end, probs, 0.0).sum(-1, keepdim=True) >= self.finished
        may_end = (progress > 0) & finished
        kept = torch.where(is_end & ~may_end, 0.0, preferred)

        # 4. Sum to 1 again; a row that has nothing left keeps the generator's probabilities.
        total = kept.sum(-1, keepdim=True)
        return torch.where(total > 0, kept / total, probs)


def main() -> None:
    """Write texts under a hard budget and under the control, and say how they end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=64, help="tokens (default: 64)")
    n = parser.parse_args().n
    torch.set_num_threads(1)  # small models are fastest with one
    folder = tinyworld.path("tiny-text")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = AutoModelForCausalLM.from_pretrained(folder)
    lenvm = LengthValueModel.from_pretrained("tiny-text-lenvm")
    prompts = []
    for topic in TOPICS:
        messages = [{"role": "user", "content": f"Write a text about the {topic}."}]
        prompts.append(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        )

    print("tiny world: a laboratory, not a benchmark")
    for name, control, limit in (("hard budget", None, n), ("EndBefore", EndBefore(n), 2 * n)):
        completions = generate(generator, lenvm, prompts, control=control, n=4, max_tokens=limit)
        lengths = [len(completion.token_ids) for completion in completions]
        whole = sum(completion.finish_reason == "stop" for completion in completions)
        within = sum(length <= n for length in lengths)
        print(f"\n{name}, n = {n}: {sum(lengths) / len(lengths):.0f} tokens in the mean, {within} of {len(lengths)} "
              f"within n, {whole} with an end of their own")  # fmt: skip
        text = tokenizer.decode(completions[0].token_ids, skip_special_tokens=True)
        print(f"  … {' '.join(text.split())[-100:]}")


if __name__ == "__main__":
    main()
