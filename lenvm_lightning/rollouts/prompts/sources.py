r"""Ready-made mappings for the data sets of the paper, and the prompts it used.

Column names as their cards on the hub list them; a local copy in the same columns serves as well. Math problems are
asked with the paper's prompt, ``\boxed{}`` and all; code questions and chats as they are.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .mapping import ColumnMapping, SourceRow
from .rows import DatasetRows, load_splits

STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}.\n\n{prompt}"


@dataclass(frozen=True)
class ReadyMade:
    """A data set that is known by name.

    Attributes:
        path: on the hub.
        name: its configuration there.
        splits: those that are taken unless one is named, with what they are for.
        mapping: made for the columns that are there, since some copies have other ones.
        unique: rows repeat their ids, and only the first of each is a new prompt.
        needs: other data sets that hold its questions, by the names that its rows give them.
    """

    path: str
    splits: dict[str, str]
    mapping: Callable[[list[str]], ColumnMapping]
    name: str | None = None
    unique: bool = False
    needs: dict[str, str] = field(default_factory=dict)


def _columns(**columns: Any) -> Callable[[list[str]], ColumnMapping]:
    return lambda there: ColumnMapping(**columns)


def _gsm8k(row: SourceRow) -> SourceRow:
    return {**row, "answer": str(row["answer"]).rpartition("####")[2].strip()}


def _mathvision(row: SourceRow) -> SourceRow:
    # Images have marks of their own there, always one; ours stands before the question.
    return {**row, "question": re.sub(r"<image\d+>", "", str(row["question"])).strip()}


def _mathvista(row: SourceRow) -> SourceRow:
    unit = row.get("unit")
    return {**row, "question": f"{row['question']} (Unit: {unit})" if unit else row["question"]}


def _mathvision_columns(there: list[str]) -> ColumnMapping:
    return ColumnMapping(
        prompt="question",
        images=("decoded_image" if "decoded_image" in there else "image",),
        options="options",
        id="id",
        meta={"answer": "answer", "options": "options", "level": "level", "subject": "subject"},
        template=STEP_BY_STEP,
        fix=_mathvision,
    )


READY_MADE = {
    "deepmath": ReadyMade(
        "zwhe99/DeepMath-103K",
        {"train": "train"},
        _columns(
            prompt="question",
            meta={"answer": "final_answer", "difficulty": "difficulty", "topic": "topic"},
            template=STEP_BY_STEP,
        ),
    ),
    "wildchat": ReadyMade(
        "allenai/WildChat-1M",
        {"train": "train"},
        _columns(messages="conversation", first_turn=True, id="conversation_hash", meta={"language": "language"}),
        unique=True,  # the hash is that of the content
    ),
    "opencodereasoning": ReadyMade(
        "nvidia/OpenCodeReasoning-2",
        {"python": "train"},
        _columns(
            prompt="question",
            id="question_id",
            meta={"dataset": "dataset", "split": "split", "index": "index", "difficulty": "difficulty"},
        ),
        unique=True,  # a row a solution
        needs={
            "taco": "BAAI/TACO",
            "apps": "codeparrot/apps",
            "code_contests": "deepmind/code_contests",
            "open-r1/codeforces": "open-r1/codeforces",
        },
    ),
    "gsm8k": ReadyMade(
        "openai/gsm8k",
        {"train": "train", "test": "test"},
        _columns(prompt="question", meta={"answer": "answer"}, template=STEP_BY_STEP, fix=_gsm8k),
        name="main",
    ),
    "math500": ReadyMade(
        "HuggingFaceH4/MATH-500",
        {"test": "test"},
        _columns(
            prompt="problem",
            id="unique_id",
            meta={"answer": "answer", "subject": "subject", "level": "level"},
            template=STEP_BY_STEP,
        ),
    ),
    "mathvista": ReadyMade(
        "AI4Math/MathVista",
        {"testmini": "test"},
        _columns(
            prompt="question",
            images=("decoded_image",),
            options="choices",
            id="pid",
            meta={
                "answer": "answer",
                "choices": "choices",
                "unit": "unit",
                "precision": "precision",
                "question_type": "question_type",
                "answer_type": "answer_type",
            },
            template=STEP_BY_STEP,
            fix=_mathvista,
        ),
    ),
    "mathvision": ReadyMade("MathLLMs/MathVision", {"test": "test"}, _mathvision_columns),
}


def question_lookup(ready: ReadyMade, copies: dict[str, str]) -> Callable[[SourceRow], SourceRow]:
    """Fills in questions that a data set leaves to others, written there as ``-``; rows that have theirs stay.

    Args:
        ready: the data set; its rows say ``dataset``, ``split`` and ``index`` of their question.
        copies: local copies of the others, by the names that the rows give them.

    Raises:
        DataError: (the function) another data set is needed and is not there.
    """
    loaded: dict[str, dict[str, DatasetRows]] = {}

    def fix(row: SourceRow) -> SourceRow:
        if str(row["question"] or "").strip() not in ("", "-"):
            return row
        name, split = str(row["dataset"]), str(row["split"])
        try:
            index = int(row["index"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"index is {row['index']!r}, expected the number of a row") from error
        if name not in ready.needs:
            raise ValueError(f"its question is in a data set {name!r}, which is not known")
        if name not in loaded:
            hint = (
                f"It holds questions that {ready.path} only points to. Give a local copy: "
                f"questions: {{{name}: /my/copy}}; or give path: a copy of {ready.path} with the questions filled in."
            )
            found = load_splits(copies.get(name, ready.needs[name]), None, hint)
            loaded[name] = {part: DatasetRows(data, f"split {part!r} of {name}", None) for part, data in found.items()}
        if split not in loaded[name] or not 0 <= index < len(loaded[name][split]):
            raise ValueError(f"its question, row {index} of split {split!r} of {name!r}, is not there")
        rows = loaded[name][split]
        return {**row, "question": _question(rows.row(index, [c for c in _QUESTION_COLUMNS if c in rows.columns]))}

    return fix


_QUESTION_COLUMNS = ("question", "description", "input_format", "output_format", "examples", "note")


def _question(row: SourceRow) -> str:
    """A programming problem as one text: the others keep it in one column, Codeforces in several."""
    if row.get("question"):
        return str(row["question"])
    parts = [str(row.get("description") or "")]
    parts += [
        f"{title}\n\n{row[key]}"
        for title, key in (("Input", "input_format"), ("Output", "output_format"))
        if row.get(key)
    ]
    examples = [
        f"{title}\n\n{example[key]}"
        for example in row.get("examples") or []
        for title, key in (("Input", "input"), ("Output", "output"))
        if example.get(key)
    ]
    parts += ["Examples", *examples] if examples else []
    parts += [f"Note\n\n{row['note']}"] if row.get("note") else []
    return "\n\n".join(part for part in parts if part) if parts[0] else ""
