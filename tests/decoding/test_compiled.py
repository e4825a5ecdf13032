"""Compiled steps say what the whole sequence says, choose the tokens of plain ones, and come in few shapes."""

import shutil

import pytest
import torch
from pairs import END, largest_difference, prompts_of, random_ids, value_model
from tiny_generators import build
from transformers import AutoModelForCausalLM, Qwen2Config

from lenvm_lightning.decoding import compiled
from lenvm_lightning.decoding.generate import generate
from lenvm_lightning.decoding.model_runner import ModelRunner
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.guidance import AtLeast, AtMost, EqualTo, Tilt


class Recorder:
    """Stands for the compiler: runs the graphs that it is given as they are, and counts them."""

    def __init__(self):
        self.shapes = []

    def __call__(self, graph, inputs):
        self.shapes.append([tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor)])
        return graph.forward


@pytest.fixture
def recorder(monkeypatch):
    """Graphs are traced as for the compiler, and not compiled."""
    torch._dynamo.reset()
    found = Recorder()
    monkeypatch.setattr(compiled, "BACKEND", {"backend": found})
    yield found
    torch._dynamo.reset()


def ids_of(completions):
    return [completion.token_ids for completion in completions]


# -- parity -----------------------------------------------------------------------------------------------------------


def test_values_and_tokens_of_text(text, text_inputs, recorder):
    settings = {"control": [EqualTo(7), Tilt(-4), AtMost(5), None], "max_tokens": 9, "seed": [5, 6, 7, 8], "n": 2}
    ours = generate(*text, text_inputs, **settings, compile=True, trace=True)
    assert ids_of(ours) == ids_of(generate(*text, text_inputs, **settings))
    assert len({len(ids) for ids in ids_of(ours)}) > 1
    assert any(END in ids for ids in ids_of(ours))
    assert sum(len(step.candidates) > 1 for completion in ours for step in completion.trace) > 10
    assert largest_difference(text[1], prompts_of(text_inputs), ours) < 1e-12
    assert len(recorder.shapes) == 2  # one of each model


@pytest.mark.slow
def test_values_and_tokens_of_pictures(vision, vision_inputs, recorder):
    together, alone = vision_inputs
    settings = {"control": EqualTo(6), "max_tokens": 6}
    ours = generate(*vision, together, **settings, compile=True, trace=True)
    assert ids_of(ours) == ids_of(generate(*vision, together, **settings))
    assert largest_difference(vision[1], prompts_of(together), ours, alone) < 1e-12
    assert recorder.shapes


@pytest.mark.slow
def test_values_in_single_precision(text_inputs, recorder):
    generator, lenvm = build("tiny-text"), value_model("tiny-text", torch.float32)
    ours = generate(generator, lenvm, text_inputs, control=Tilt(-3), max_tokens=9, compile=True, trace=True)
    assert largest_difference(lenvm, prompts_of(text_inputs), ours) < 1e-5


def test_a_mask_of_another_token_fails(text, text_inputs, recorder, monkeypatch):
    """A control that must fail: new tokens do not see the last one that their row holds."""
    whole = compiled.step_mask

    def short(columns, width, within, *more):
        seen = whole(columns, width, within, *more)
        return seen & (torch.arange(width) != columns[:, :1, None] - 1)

    monkeypatch.setattr(compiled, "step_mask", short)
    ours = generate(*text, text_inputs, control=EqualTo(4), max_tokens=4, compile=True, trace=True)
    assert largest_difference(text[1], prompts_of(text_inputs), ours) > 1e-3


@pytest.mark.parametrize("window", [None, 5])
def test_sliding_windows(window, recorder):
    config = Qwen2Config(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=window is not None, sliding_window=window, max_window_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    decoder = ModelRunner(model, compiled=True)
    cache, prompt, after = decoder.new_cache(1), random_ids(12, 1), random_ids(4, 2)
    prompt, after = [number % 100 for number in prompt], [number % 100 for number in after]
    with torch.inference_mode():
        cache.fill([0], decoder.prefill([prompt]), [0], len(prompt))
        found = [decoder.forward(cache, torch.tensor([[token]])).logits[0, -1] for token in after]
        expected = model(torch.tensor([[*prompt, *after]])).logits[0, len(prompt) :]
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-12, rtol=0)
    assert len(recorder.shapes) == 1


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_few_shapes_serve_many_rows(text, recorder):
    """Completions end and others take their rows, rows grow beyond a width; nothing of that is compiled anew."""
    prompts = [random_ids(count, count) for count in (222, 3, 40, 17, 5, 90, 1, 33, 8)]
    controls = [AtLeast(38), EqualTo(4), Tilt(-9), EqualTo(9), Tilt(3), AtMost(3), EqualTo(6), Tilt(-1), EqualTo(5)]
    settings = {"control": controls, "max_tokens": [40, *[14] * 8], "seed": list(range(9))}
    ours = generate(*text, prompts, **settings, compile=True)
    assert ids_of(ours) == ids_of(generate(*text, prompts, **settings))
    lines = {shapes for graph in recorder.shapes for shapes in graph if len(shapes) == 2 and shapes[1] == 32}
    assert len({count for count, _ in lines}) > 1  # widths 256 and 512
    before = len(recorder.shapes)
    assert before <= 8
    assert ids_of(generate(*text, prompts, **settings, compile=True)) == ids_of(ours)
    assert len(recorder.shapes) == before  # once in a process


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_no_compiler(text, text_inputs, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(GenerationError, match=r"compile needs a compiler.*looked for .*apt install g\+\+"):
        generate(*text, text_inputs, control=EqualTo(4), compile=True)


def test_too_many_shapes_are_an_error(text, recorder, monkeypatch):
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 2)
    generate(*text, [random_ids(3)], control=Tilt(-1), max_tokens=2, compile=True)
    with pytest.raises(GenerationError, match="has compiled 2 shapes of steps already"):
        generate(*text, [random_ids(3)] * 2, control=Tilt(-1), max_tokens=3, compile=True)


@pytest.mark.slow
def test_compiled_for_a_cpu(text_inputs):
    """By the compiler itself, with kernels of its own."""
    torch._dynamo.reset()
    generator, lenvm = build("tiny-text"), value_model("tiny-text", torch.float32)
    settings = {"control": [EqualTo(7), Tilt(-4), AtMost(5), None], "max_tokens": 9}
    ours = generate(generator, lenvm, text_inputs, **settings, compile=True, trace=True)
    assert ids_of(ours) == ids_of(generate(generator, lenvm, text_inputs, **settings))
    assert largest_difference(lenvm, prompts_of(text_inputs), ours) < 1e-5
