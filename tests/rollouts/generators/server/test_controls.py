"""Controls of the length, as the research code's server takes them."""

import pytest
import torch
from scripted_server import generator, models, prompts

from lenvm_lightning.decoding.custom_params import write_custom_params
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import GenerationError, GeneratorError
from lenvm_lightning.guidance import AtLeast, AtMost, EqualTo, Gated, Scale, Tilt
from lenvm_lightning.rollouts.generators.interface import GeneratedText, PromptRequest
from lenvm_lightning.rollouts.generators.server.backends import BACKENDS

WIRE = [
    (Tilt(-5), {"value_mode": "centered_exp", "value_scale": -5.0}),
    (EqualTo(128, mode="hard"), {"target_length": 128, "target_length_mode": "total", "value_constraint": "eq"}),
    (EqualTo(128, mode="soft"), {"target_length": 128, "target_length_mode": "total", "value_constraint": "eq_soft"}),
    (AtMost(64, mode="hard"), {"target_length": 64, "target_length_mode": "total", "value_constraint": "le"}),
    (AtLeast(200, mode="hard"), {"target_length": 200, "target_length_mode": "total", "value_constraint": "ge"}),
    (Scale(0.5, "mul"), {"value_mode": "mul", "value_scale": 0.5}),
    (Scale(2, "length_mul"), {"value_mode": "length_mul", "value_scale": 2.0}),
    (Scale(-0.25, "linear"), {"value_mode": "linear", "value_scale": 0.75}),
    (Scale(0.25, "linear"), {"value_mode": "linear", "value_scale": 1.25}),
    (Gated(Tilt(3), min_g=0.2), {"value_mode": "centered_exp", "value_scale": 3.0, "value_min": 0.2}),
    (
        Gated(Gated(AtMost(64, mode="hard"), min_entropy=0.5), min_entropy=0.3),
        {"target_length": 64, "target_length_mode": "total", "value_constraint": "le", "value_entropy_threshold": 0.5},
    ),
    (Gated(Tilt(-5)), {"value_mode": "centered_exp", "value_scale": -5.0}),
    (Tilt(torch.tensor(-5.0)), {"value_mode": "centered_exp", "value_scale": -5.0}),
]
SHORTLIST = SamplingParams(top_k=15, max_tokens=32, seed=5)


def under(*controls):
    return [
        PromptRequest(prompt.prompt, (0, 1), control) for prompt, control in zip(prompts(9), controls, strict=False)
    ]


def ask(server, requests, sampling=SHORTLIST, /, **options):
    return list(generator(server, **{"server": "research", **options}).sample(requests, sampling))


@pytest.mark.parametrize(("control", "expected"), WIRE)
def test_a_control_is_sent_with_its_request(server, control, expected):
    assert write_custom_params(control) == expected
    assert write_custom_params(control, 0.999) == {**expected, "gamma": 0.999}
    answers = ask(server, under(control), gamma=0.999)
    assert all(isinstance(answer.result, GeneratedText) for answer in answers)
    assert [body["custom_params"] for body in server.bodies] == 2 * [{**expected, "gamma": 0.999}]
    assert {(body["top_k"], body["return_token_ids"], body["max_completion_tokens"]) for body in server.bodies} == {
        (15, True, 32)
    }
    assert not any("logprobs" in body for body in server.bodies)


def test_each_request_has_its_own_numbers_and_none_has_none(server):
    ask(server, under(Tilt(-1), Tilt(-2)))
    sent = {body["messages"][0]["content"]: body["custom_params"]["value_scale"] for body in server.bodies}
    assert sent == {"0?": -1.0, "1?": -2.0}
    del server.bodies[:]
    ask(server, under(None, None), gamma=0.999)
    assert len(server.bodies) == 4
    assert not any("custom_params" in body for body in server.bodies)


@pytest.mark.parametrize(
    ("control", "said"),
    [
        (EqualTo(128), "no name for the mode 'penalty'.*mode='hard' or mode='soft'.*local generator"),
        (Gated(AtMost(64), min_entropy=0.1), "no name for the mode 'penalty'.*use mode='hard'"),
        (lambda probs, *_: probs, "no name for the control.*knows Tilt, EqualTo"),
        (Scale(0, "mul"), "leaves the distribution as it is"),
        (Gated(EqualTo(128, mode="hard"), min_g=0.1), "reads no min_g where there is a target"),
        (Tilt(torch.tensor([1.0, 2.0])), "numbers for several rows"),
    ],
)
def test_what_the_research_server_has_no_name_for_is_refused(server, control, said):
    with pytest.raises(GenerationError, match=said):
        ask(server, under(control))
    assert not server.bodies


@pytest.mark.parametrize(
    ("controls", "sampling", "said"),
    [
        ([Tilt(-5)], SamplingParams(), "tilts only among top_k candidates: set top_k"),
        ([AtMost(64, mode="hard")], SamplingParams(temperature=0.0), "does not guide at temperature 0"),
        ([Tilt(-5), AtMost(64, mode="hard")], SHORTLIST, r"Tilt\(beta=-5\) and AtMost.*one kind after the other"),
        ([None, Tilt(-5)], SHORTLIST, r"None and Tilt\(beta=-5\)"),
        ([Scale(0.5, "mul"), Scale(0.5)], SHORTLIST, "one kind after the other"),
    ],
)
def test_what_it_would_do_otherwise_is_refused(server, controls, sampling, said):
    """It sees no tilt without top_k, no control where it is greedy, and takes one kind of control a batch."""
    with pytest.raises(GeneratorError, match=said):
        ask(server, under(*controls), sampling)
    assert len(server.bodies) <= 2 * (len(controls) - 1)


@pytest.mark.parametrize(
    ("kind", "field"),
    [("lenvm", {"lenvm": "tilt:-5"}), ("vllm-lenvm", {"vllm_xargs": {"lenvm": "tilt:-5"}})],
)
def test_servers_of_this_package_take_controls_as_text(server, kind, field):
    ask(server, under(Tilt(-5), None), server=kind)
    assert len(server.bodies) == 4
    guided = [body for body in server.bodies if body["messages"][0]["content"] == "0?"]
    assert [{name: body.get(name) for name in field} for body in guided] == 2 * [field]
    assert sum("lenvm" in body or "vllm_xargs" in body for body in server.bodies) == 2


@pytest.mark.parametrize("kind", [name for name, backend in BACKENDS.items() if backend.controls is None])
def test_other_servers_do_not_get_a_control_that_they_would_ignore(server, kind):
    with pytest.raises(GeneratorError, match=rf"Tilt\(beta=-5\).*kind '{kind}'.*server='research'"):
        ask(server, under(Tilt(-5)), SamplingParams(), server=kind)
    assert not server.bodies
    with pytest.raises(GeneratorError, match="gamma is for servers of kind 'research'"):
        generator(server, server=kind, gamma=0.99)


def test_a_gamma_that_is_none_is_refused(server):
    with pytest.raises(GenerationError, match=r"gamma must lie between 0 and 1, found 1\.2"):
        ask(server, under(Tilt(-5)), gamma=1.2)
    assert not server.bodies


def test_the_research_server_signs_as_sglang_and_has_to_be_named(server):
    server.pages["/v1/models"] = models(("m", "sglang"))
    with pytest.raises(GeneratorError, match="kind 'sglang'"):
        ask(server, under(Tilt(-5)), server="auto")
