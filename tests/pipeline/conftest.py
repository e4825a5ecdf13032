"""Recipes that the tests of their stages share."""

import pytest

TRAINS = """\
fit:
  model: {{class_path: lenvm_lightning.TextLenVM, init_args: {{backbone: tiny-text, gamma: 0.99}}}}
  data: {{class_path: datamodules.TextRollouts, init_args: {{files: {file}, batch_tokens: 1024, val_completions: 12}}}}
  trainer: {{max_epochs: 1, max_steps: 2, log_every_n_steps: 1}}
variants:
  jobs: 2
  runs:
    shallow: {{fit.model.backbone.keep_layers: 1, fit.model.backbone.pretrained: true}}
evaluate:
  - {{task: length, generator: tiny-text, lenvm: runs/r/model, limit: 2, n: 2, max_tokens: 60}}
  - {{task: ablation, runs: [shallow]}}
"""


@pytest.fixture
def trains(here, text_rollouts):
    (here / "r.yaml").write_text(TRAINS.format(file=text_rollouts))
    return here / "runs" / "r"
