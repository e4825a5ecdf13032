"""Log-probabilities of a text that is there already."""

import pytest
import torch
from tiny_generators import build

from lenvm_lightning.decoding import read_back as module
from lenvm_lightning.decoding.engine import Engine
from lenvm_lightning.decoding.prefill import Request
from lenvm_lightning.decoding.read_back import read_back
from lenvm_lightning.decoding.sampling_params import SamplingParams

IDS = [5, 40, 41, 7, 300, 12, 9, 9, 80]


def test_each_token_given_those_before_it():
    model = build("tiny-text")
    read = read_back(model, IDS, likeliest=3)
    with torch.inference_mode():
        logprobs = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    assert [one.token_id for one in read] == IDS
    assert (read[0].logprob, read[0].likeliest) == (None, ())
    for place, one in enumerate(read[1:], start=1):
        assert one.logprob == pytest.approx(float(logprobs[place - 1, IDS[place]]), abs=1e-5)
        best = logprobs[place - 1].topk(3)
        assert [token for token, _ in one.likeliest] == best.indices.tolist()
        assert [logprob for _, logprob in one.likeliest] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert all(not one.likeliest for one in read_back(model, IDS))
    [alone] = read_back(model, [5])
    assert alone.logprob is None


def test_piece_by_piece_it_is_the_same(monkeypatch):
    model = build("tiny-text")
    whole = read_back(model, IDS, likeliest=2)
    monkeypatch.setattr(module, "_AT_ONCE", 2 * model.config.vocab_size)
    for one, same in zip(read_back(model, IDS, likeliest=2), whole, strict=True):
        assert one.token_id == same.token_id
        assert one.logprob == pytest.approx(same.logprob, abs=1e-5)
        assert [token for token, _ in one.likeliest] == [token for token, _ in same.likeliest]


def test_what_the_engine_says_of_what_it_writes():
    model = build("tiny-text")
    [written] = Engine(model, max_rows=1).run([Request("a", IDS, [3], SamplingParams(max_tokens=20))])
    read = read_back(model, [*IDS, *written.token_ids])[len(IDS) :]
    assert sum(one.logprob for one in read) == pytest.approx(written.logprob, abs=1e-3)
