"""Rollouts: completions sampled from a generator, the only supervision there is."""

from .record import Rollout, parse_record

__all__ = ["Rollout", "parse_record"]
