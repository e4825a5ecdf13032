"""What sampling params may be is said once, and told all at once; no torch is needed for that."""

import subprocess
import sys

import pytest

from lenvm_lightning.decoding.sampling_params import SamplingParams, completion_seed


def test_all_that_cannot_be_is_told_at_once():
    with pytest.raises(ValueError, match="temperature must be") as told:
        SamplingParams(temperature=float("nan"), top_k=-1, top_p=0.0, min_p=1.0, max_tokens=0, seed=0.5, stop=("",))
    problems = str(told.value).split("; ")
    assert [problem.split()[0] for problem in problems] == [
        "temperature", "top_k", "top_p", "min_p", "max_tokens", "seed", "stop"
    ]  # fmt: skip
    assert "top_p must be above 0 and at most 1, found 0.0" in problems


@pytest.mark.parametrize("wrong", [{"top_k": True}, {"temperature": "hot"}, {"stop": "end"}, {"max_tokens": 2.0}])
def test_values_of_another_kind_are_refused(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
        SamplingParams(**wrong)


def test_a_record_names_stop_texts_only_where_there_are_any():
    assert "stop" not in SamplingParams().as_dict()
    assert SamplingParams(stop=["\n\n"]).as_dict()["stop"] == ["\n\n"]
    assert SamplingParams(stop=["a"]) == SamplingParams(stop=("a",))


def test_seeds_depend_on_all_three_and_nothing_else():
    seeds = {completion_seed(seed, prompt, number) for seed in (0, 1) for prompt in ("a", "b") for number in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert completion_seed(7, "p3", 2) == completion_seed(7, "p3", 2) == 1877368126
    assert completion_seed(7, "half a character \ud83d", 2) != completion_seed(7, "half a character \udcff", 2)


def test_it_needs_no_torch():
    code = "import sys, lenvm_lightning.decoding.sampling_params; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
