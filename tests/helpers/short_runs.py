"""Overrides that make a run of a shipped recipe short."""

SHORT = ["--fit.trainer.max_steps", "3", "--fit.trainer.max_epochs", "1", "--fit.data.val_completions", "12"]
SHORT += ["--fit.trainer.log_every_n_steps", "1"]
