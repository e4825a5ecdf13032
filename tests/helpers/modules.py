"""Training modules from settings by their own names, whatever group they belong to."""

from dataclasses import fields

from lenvm_lightning import BackboneConfig, LossConfig, OptimizerConfig

_GROUPS = {"backbone": BackboneConfig, "loss": LossConfig, "optimizer": OptimizerConfig}


def make_module(cls, source, **settings):
    """``make_module(TextLenVM, "tiny-text", lr=1e-3, keep_layers=2, gamma=0.9)``."""
    groups = {"backbone": {"source": source}, "loss": {}, "optimizer": {}}
    for name, kind in _GROUPS.items():
        for field in fields(kind):
            if field.name in settings and field.name != "kind":  # two groups have one
                groups[name][field.name] = settings.pop(field.name)
    made = {name: _GROUPS[name](**given) for name, given in groups.items()}
    return cls(**{**made, **settings})
