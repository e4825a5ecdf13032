"""Evaluations by their command line, and what they leave."""

import json

from lenvm_lightning.cli.evaluate import main
from lenvm_lightning.evaluation.results import Results


class Found:
    """What a call left in its folder."""

    def __init__(self, folder):
        self.folder = folder
        self.content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        self.results = Results.from_dict(self.content)
        self.report = (folder / "report.md").read_text(encoding="utf-8")
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        self.samples = [json.loads(line) for line in lines]

    def row(self, **label):
        [row] = [r for t in self.results.tables for r in t.rows if label.items() <= r.label.items()]
        return row.measures


def run(here, words, status=0):
    assert main(words.split()) == status
    [folder] = (here / "results").iterdir()
    return Found(folder)


def rows(file, *content):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
