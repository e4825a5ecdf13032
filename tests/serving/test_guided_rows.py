"""Requests that another engine writes get the tokens that `generate` gives: they come, go, wait and come again."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from lenvm_lightning import tinyworld
from lenvm_lightning.decoding.generate import generate
from lenvm_lightning.decoding.sampling_params import SamplingParams, completion_seed
from lenvm_lightning.decoding.vocabulary import forbidden_ids, stop_ids_of
from lenvm_lightning.guidance import AtMost, EqualTo, Gated, Tilt
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.rollouts.prompting import encode_prompt
from lenvm_lightning.serving.guided_rows import GuidedRow, GuidedRows

CONTROLS = [
    EqualTo(24),
    AtMost(30),
    Tilt(-5.0),
    EqualTo(40, mode="soft"),
    Gated(Tilt(3.0), min_entropy=0.1),
    EqualTo(12),
]
QUESTIONS = ["Write a text about the sea.", "What is 3 + 4?", "Write a text about the river, with many words."]


@pytest.fixture(scope="module")
def pair():
    generator = AutoModelForCausalLM.from_pretrained(tinyworld.path("tiny-text")).eval()
    return generator, LengthValueModel.from_pretrained("tiny-text-lenvm"), load_processor("tiny-text")


def requests_of(pair):
    generator, _, tokenizer = pair
    stop_ids = stop_ids_of(generator, tokenizer)
    rows = []
    for number, control in enumerate(CONTROLS):
        ids, _ = encode_prompt(tokenizer, [{"role": "user", "content": QUESTIONS[number % 3]}], [])
        params = SamplingParams(max_tokens=60, top_k=15, top_p=0.999, seed=number)
        rows.append(GuidedRow(ids, [], control, params, completion_seed(number, "", 0), stop_ids))
    return rows


def expected_of(pair, row):
    generator, lenvm, tokenizer = pair
    [completion] = generate(
        generator,
        lenvm,
        [row.prompt_ids],
        control=row.control,
        max_tokens=60,
        seed=row.params.seed,
        tokenizer=tokenizer,
    )
    return completion.token_ids


@torch.inference_mode()
def logits_of(generator, rows):
    """What another engine would compute: whole forwards, one by one."""
    return torch.cat([generator(input_ids=torch.tensor([row.ids()])).logits[:, -1] for row in rows])


def guided(pair):
    generator, lenvm, tokenizer = pair
    return GuidedRows(lenvm, forbidden_ids(generator, lenvm, tokenizer))


def ended(row):
    return len(row.written) == 60 or (row.written and row.written[-1] in row.stop_ids)


def test_one_by_one_and_all_at_once(pair):
    expected = [expected_of(pair, row) for row in requests_of(pair)]
    rows, engine = requests_of(pair), guided(pair)
    while going := [row for row in rows if not ended(row)]:
        for row, token in zip(going, engine.choose(going, logits_of(pair[0], going)).tolist(), strict=True):
            row.written.append(token)
            if ended(row):
                engine.remove(row)
    assert [row.written for row in rows] == expected
    [alone] = rows = requests_of(pair)[1:2]
    engine = guided(pair)
    while not ended(alone):
        alone.written += engine.choose(rows, logits_of(pair[0], rows)).tolist()
    assert alone.written == expected[1]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_engine_does_between(pair, seed):
    # It begins requests late, leaves some out of a step, throws choices away, and changes their order.
    expected = [expected_of(pair, row) for row in requests_of(pair)]
    rows, engine, chance = requests_of(pair), guided(pair), random.Random(seed)
    steps = 0
    while going := [row for row in rows if not ended(row)]:
        chosen = [row for row in going if chance.random() < 0.7] or going[:1]
        chance.shuffle(chosen)
        tokens = engine.choose(chosen, logits_of(pair[0], chosen)).tolist()
        for row, token in zip(chosen, tokens, strict=True):
            if chance.random() < 0.8:
                row.written.append(token)
            if chance.random() < 0.05 or ended(row):
                engine.remove(row)  # preempted, or done
        steps += 1
        assert steps < 2000
    assert [row.written for row in rows] == expected


def test_a_cache_is_as_large_as_what_is_written_in_it(pair):
    rows, engine = requests_of(pair), guided(pair)
    engine.choose(rows, logits_of(pair[0], rows))
    assert engine._cache.rows == 6
    engine.choose(rows[:2], logits_of(pair[0], rows[:2]))
    assert engine._cache.rows == 2
    engine.choose(rows[2:3], logits_of(pair[0], rows[2:3]))  # others came in their place
    assert engine._cache.rows <= 2


def test_logits_that_are_no_numbers_leave_no_token_and_harm_nobody(pair):
    rows, engine = requests_of(pair)[:2], guided(pair)
    logits = logits_of(pair[0], rows)
    good = engine.choose(rows, logits).tolist()
    logits = torch.stack([torch.full_like(logits[0], torch.nan), logits[1]])
    assert engine.choose(rows, logits).tolist() == [-1, good[1]]
