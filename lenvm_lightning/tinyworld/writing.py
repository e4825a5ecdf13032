"""Writing on a topic, with a loosely obeyed length constraint, drawn at random.

A text is an opening, paragraphs of sentences from a small grammar, and a closing, so that a model can see an end coming
and a reader can see why. Its length scatters around what was asked for, as the lengths of language models do.
"""

import math
from dataclasses import dataclass
from random import Random

from ..errors import DataError
from ..rollouts.constraint import CONSTRAINTS

PLACES = ("river", "mountain", "house", "school", "garden", "winter", "summer", "market", "sea", "city", "train",
          "forest", "farm", "library", "kitchen", "bridge", "island", "doctor", "teacher", "moon")  # fmt: skip
SHORTEST, LONGEST = 16, 256  # tokens that may be asked for
_GRID = (16, 32, 64, 128, 256)  # lengths that benchmarks ask for: seen more often than others
_WORDS_A_TOKEN = 0.80
_FREE = (60, 0.7)  # median tokens and scatter of a text without a constraint
_LIMIT = 600  # tokens, however long was asked for
_LEAN = {"equal to": 0.0, "at most": -0.4, "at least": 0.4}  # mean of log(length / target length)
_SCATTER = 0.4  # standard deviation of log(length / target length)

_SENTENCES = 4  # of a part
_PARTS = ("Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh", "Eighth", "Ninth", "Tenth", "Next")
_PEOPLE = ("people", "children", "my friends", "the women", "the men", "my brother and sister", "students")
_TIMES = ("in the morning", "every day", "in the evening", "at night", "on the weekend", "in the winter")
_QUALITIES = ("big", "small", "old", "new", "quiet", "beautiful", "long", "cold", "warm", "good", "strong", "bright")
_ACTIONS = ("walk", "play", "work", "talk", "read a book", "look at the sky", "eat and drink", "wait for a friend")
# Of topics for testing: words that the tiny tokenizer knows, and no topic above has.
_UNSEEN_QUALITIES = ("red", "green", "blue", "yellow", "large", "high", "low", "open", "short", "great", "round")
_SEED_OF_UNSEEN = 1000
_LINKS = ("", "", "", "", "also, ", "but ", "for example, ", "by the way, ", "then ")


@dataclass(frozen=True)
class WritingProblem:
    """A topic and a length constraint: one of `CONSTRAINTS` with `length` in tokens, or an empty text with 0."""

    topic: str
    constraint: str = ""
    length: int = 0

    @property
    def content(self) -> str:
        """What makes a prompt the same as another."""
        return f"{self.topic} {self.constraint} {self.length}"

    @property
    def prompt(self) -> str:
        """The whole text a model is asked."""
        return wording(self.topic, self.constraint, self.length)


def wording(topic: str, constraint: str = "", length: int | str = 0) -> str:
    """Say what is asked for. Constraint and length may be marks that are filled in later."""
    task = f"Write a text about {topic}."
    return f"{task} The text must be {constraint} {length} tokens long." if constraint else task


def unseen_topics(count: int, seed: int = 0) -> list[str]:
    """Topics with an adjective that no topic of the tiny world's corpus has: no model of it has seen one of them.

    Args:
        count: how many.
        seed: another one has other topics, as long as the count is the same.

    Raises:
        DataError: there are not so many, or less than one is asked for.
    """
    every = [f"the {quality} {place}" for quality in _UNSEEN_QUALITIES for place in PLACES]
    if count < 1 or seed < 0:
        raise DataError(f"count must be at least 1 and seed at least 0, got {count} and {seed}")
    if (seed + 1) * count > len(every):
        raise DataError(
            f"there are {len(every)} unseen topics, and {(seed + 1) * count} are needed for {count} of seed {seed}: "
            "ask for fewer"
        )
    Random(_SEED_OF_UNSEEN).shuffle(every)
    return every[seed * count : (seed + 1) * count]


def draw_problem(rng: Random, free: float = 0.15) -> WritingProblem:
    """Draw a topic and a length constraint; a share `free` has none."""
    topic = f"the {rng.choice(PLACES)}" if rng.random() < 0.5 else f"the {rng.choice(_QUALITIES)} {rng.choice(PLACES)}"
    if rng.random() < free:
        return WritingProblem(topic)
    if rng.random() < 0.5:
        return WritingProblem(topic, rng.choice(CONSTRAINTS), rng.choice(_GRID))
    return WritingProblem(
        topic, rng.choice(CONSTRAINTS), round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
    )


def draw_solution(rng: Random, problem: WritingProblem) -> str:
    """Draw a text on the topic, about as long as asked for."""
    if not problem.constraint:
        tokens = _FREE[0] * math.exp(rng.gauss(0, _FREE[1]))
    else:
        tokens = problem.length * math.exp(rng.gauss(_LEAN[problem.constraint], _SCATTER))
    words = max(4, min(tokens, _LIMIT) * _WORDS_A_TOKEN)
    text = _opening(rng, problem.topic)
    closing = _closing(rng, problem.topic)
    sentences = 1
    while len(text.split()) + len(closing.split()) < words:
        part, place = divmod(sentences, _SENTENCES)
        # Parts are counted, which tells a small model, and a reader, how far the text has come.
        text += " " if place else f"\n\n{_PARTS[min(part, len(_PARTS)) - 1]}, "
        sentence = _sentence(rng, problem.topic)
        text += sentence[0].upper() + sentence[1:] if place else sentence
        sentences += 1
    short = len(text.split()) + len(closing.split()) > 1.3 * words
    return text if short else f"{text} {closing}"


def distance(problem: WritingProblem, text: str) -> float:
    """Return how far a text is from its target length: |log(length / target length)|, 0 without a constraint."""
    if not problem.constraint:
        return 0.0
    return abs(math.log(len(text.split()) / _WORDS_A_TOKEN / problem.length) - _LEAN[problem.constraint])


def _opening(rng: Random, topic: str) -> str:
    return rng.choice((
        f"This is about {topic}.",
        f"Let me tell you about {topic}.",
        f"{topic.capitalize()} is {rng.choice(_QUALITIES)} and {rng.choice(_QUALITIES)}.",
        f"I like {topic}.",
    ))  # fmt: skip


def _sentence(rng: Random, topic: str) -> str:
    people, time, quality, action = (rng.choice(words) for words in (_PEOPLE, _TIMES, _QUALITIES, _ACTIONS))
    sentence = rng.choice((
        f"{people} {action} near {topic} {time}.",
        f"{time} {topic} is very {quality}.",
        f"{topic} was {quality} before, and now it is {rng.choice(_QUALITIES)}.",
        f"{people} say that {topic} is {quality}.",
        f"when it is {quality}, {people} {action}.",
        f"there are many {quality} things to see at {topic}.",
        f"some {action} and others {rng.choice(_ACTIONS)}.",
        f"nobody knows why {topic} is so {quality}.",
    ))  # fmt: skip
    return rng.choice(_LINKS) + sentence


def _closing(rng: Random, topic: str) -> str:
    return rng.choice((
        f"In short, {topic} is {rng.choice(_QUALITIES)}.",
        f"That is all about {topic}.",
        f"So this was the story of {topic}.",
        "Finally, I want to say thank you for reading.",
    ))  # fmt: skip
