import re

import numpy as np
import pytest

from lenvm_lightning.tinyworld import corpus, prompt_sets, writing


def test_corpus_keeps_the_draft_nearest_to_its_target_length():
    asked = writing.WritingProblem("the sea", "equal to", 10)
    assert writing.distance(asked, "word " * 8) == pytest.approx(0.0)  # 0.8 words a token
    assert writing.distance(asked, "word " * 4) == writing.distance(asked, "word " * 16) == pytest.approx(np.log(2))
    assert writing.distance(writing.WritingProblem("the sea"), "word") == 0.0
    documents = [corpus.document("text", 0, index) for index in range(1500)]
    found = [(d, re.search(r"must be equal to (\d+) tokens", d.prompt)) for d in documents]
    far = [abs(np.log(len(d.completion.split()) / 0.8 / int(m[1]))) for d, m in found if m]
    assert len(far) > 100
    assert np.mean(far) < 0.2  # of one draft it is 0.3


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_corpus_leaves_the_test_prompts_out(kind):
    names = ("tiny-vqa",) if kind == "vision" else ("tiny-math", "tiny-write")
    held_out = {p.messages[0]["content"] for name in names for p in prompt_sets.prompt_set(name, "test", 300)}
    documents = [corpus.document(kind, 0, index) for index in range(2000)]
    if kind == "text":  # the same question about another image is another problem
        assert not held_out & {document.prompt for document in documents}
    assert documents[:3] == [corpus.document(kind, 0, index) for index in range(3)]
    assert documents[0] != corpus.document(kind, 1, 0)
