"""The LightningModule, its optimizers, strategies and callbacks."""
