"""The shipped tiny generators are as good as their recipes say."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenvm_lightning import tinyworld
from lenvm_lightning.rollouts.generators.interface import GeneratedText
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.tinyworld.prompt_sets import prompt_set
from lenvm_lightning.tinyworld.quality import _quality, measure


def test_transformers_alone_solves_a_story():
    """No line of this package between the folder and the answer."""
    folder = tinyworld.path("tiny-text")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = prompt_set("tiny-math", "test", 1)[0]
    text = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
    output = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=400, do_sample=False)
    assert f"\\boxed{{{prompt.meta['answer']}}}" in tokenizer.decode(output[0])


@pytest.mark.slow  # the weights that ship change with a training, not with the code
@pytest.mark.parametrize(
    ("name", "prompts", "least"), [("tiny-text", "tiny-math", 0.75), ("tiny-vl", "tiny-vqa", 0.88)]
)
def test_quality(name, prompts, least):
    quality = measure(LocalGenerator.load(name), prompts, prompts=64, n=8)
    assert quality.pass_at_1 >= least
    assert quality.p99 / quality.p50 > 2.5
    assert quality.truncated < 0.01


def test_quality_by_hand():
    def completion(text: str, tokens: int, truncated: bool = False) -> GeneratedText:
        return GeneratedText(text, [0] * tokens, "length" if truncated else "stop", -0.5 * tokens, 0)

    math = [completion("\\boxed{7}", 10), completion("\\boxed{7}", 30), completion("\\boxed{8}", 20, truncated=True)]
    writing = [completion("x", 65)]  # 64 and EOS
    demand = {"constraint": "equal to", "length": 64}
    quality = _quality([({"answer": "7"}, math), (demand, writing)])
    assert quality.completions == 4
    assert quality.pass_at_1 == pytest.approx(3 / 4)
    assert quality.mean_tokens == pytest.approx(125 / 4)
    assert quality.shortest_correct == pytest.approx((10 / 20 + 65 / 65) / 2)
    assert quality.equal_to_score == 100
    assert quality.logprob_per_token == pytest.approx(-0.5)
    assert quality.truncated == 0.25
