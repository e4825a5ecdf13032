"""The command line as a whole: overrides, and help at every level."""

import pytest

from lenvm_lightning.cli.main import main, split_overrides


def test_overrides_are_taken_out_of_the_line():
    rest, overrides = split_overrides(
        ["run", "x", "--fit.a.b", "1", "--sample.n=3", "--fit.c=d=e", "--check", "--fit.z"]
    )
    assert rest == ["run", "x", "--check"]
    assert overrides == [("fit.a.b", "1"), ("sample.n", "3"), ("fit.c", "d=e"), ("fit.z", None)]


def test_help_at_every_level(capsys):
    for command, words in ((["--help"], "COMMAND"), (["run", "--help"], "examples:")):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
        assert words in capsys.readouterr().out
    assert main(["run", "text_lenvm", "--fit.help"]) == 0
    out = capsys.readouterr().out
    for words in (
        "--trainer.max_epochs", "batch_tokens", "--checkpoint.every_n_steps", "--model.backbone.freeze_vision",
        "leave vision tower and projector as they are", "--model.optimizer.lr", "peak learning rate",
        "--model.loss.target", "--model.lora.rank",
    ):  # fmt: skip
        assert words in out
