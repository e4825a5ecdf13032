from random import Random

import numpy as np
import pytest

from lenvm_lightning.errors import DataError
from lenvm_lightning.rollouts.constraint import CONSTRAINTS
from lenvm_lightning.tinyworld import writing


def test_texts_are_loosely_as_long_as_asked_for(tokenizer):
    """The corpus obeys length constraints about as well as language models do: Length Score of "equal to" near 40."""
    scores = {constraint: [] for constraint in CONSTRAINTS}
    for seed in range(600):
        rng = Random(seed)
        problem = writing.draw_problem(rng, free=0)
        length = len(tokenizer(writing.draw_solution(rng, problem)).input_ids)
        scores[problem.constraint].append(length / problem.length - 1)
    equal = np.array(scores["equal to"])
    assert 30 < 100 * np.exp(np.where(equal < 0, 5, -2) * equal).mean() < 50
    assert np.mean(scores["at most"]) < np.mean(scores["equal to"]) < np.mean(scores["at least"])


def test_unseen_topics_have_known_adjectives_and_are_not_of_the_corpus(tokenizer):
    topics = writing.unseen_topics(220)
    assert len(set(topics)) == 220
    rng = Random(0)
    assert not set(topics) & {writing.draw_problem(rng).topic for _ in range(20_000)}
    assert all(len(tokenizer.encode(f" {topic.split()[1]}")) == 1 for topic in topics)
    assert not set(writing.unseen_topics(30, seed=0)) & set(writing.unseen_topics(30, seed=1))


@pytest.mark.parametrize(("count", "seed", "message"), [
    (0, 0, "at least 1"), (5, -1, "at least 0"), (221, 0, "there are 220 unseen topics"), (74, 2, "222 are needed"),
])  # fmt: skip
def test_unseen_topics_run_out(count, seed, message):
    with pytest.raises(DataError, match=message):
        writing.unseen_topics(count, seed)
