"""Stories that are thought about between marks."""

from random import Random

from lenvm_lightning.tinyworld import arithmetic, thinking
from lenvm_lightning.tinyworld.corpus import document, split
from lenvm_lightning.tinyworld.prompt_sets import check, prompt_set


def test_a_solution_thinks_between_marks_and_then_answers_right():
    for seed in range(200):
        rng = Random(seed)
        problem = thinking.draw_problem(rng)
        text = thinking.draw_solution(rng, problem)
        assert text.startswith("<think>\n")
        assert text.count("<think>") == text.count("</think>") == 1
        steps, answer = text.split("\n</think>\n")
        assert steps.endswith((".", "!", "?"))  # the thinking ends with a whole sentence
        assert "\\boxed" not in steps
        assert check({"answer": problem.answer}, answer, 0)
        assert all(step.equation in steps for step in problem.story.steps)


def test_the_stories_are_those_of_arithmetic_asked_for_in_another_way():
    story, problem = arithmetic.draw_problem(Random(3)), thinking.draw_problem(Random(3))
    assert problem.story == story
    assert problem.prompt.split("\n\n")[1] == story.prompt.split("\n\n")[1]
    assert "<think>" in problem.prompt
    assert "<think>" not in story.prompt


def test_no_document_is_of_a_problem_for_testing():
    held_out = {prompt.messages[0]["content"].split("\n\n")[1] for prompt in prompt_set("tiny-think", "test", 100)}
    drawn = {document("thinking", 0, index).prompt.split("\n\n")[1] for index in range(100)}
    assert len(drawn) > 90
    assert not held_out & drawn
    assert split(thinking.draw_problem(Random(0)).content) in ("train", "test")
