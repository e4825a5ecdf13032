"""The whole distribution of what remains: how heads predict it, how sure its intervals are, how it is scored.

Pure functions on tensors, torch alone: a head's outputs become a `LengthDistribution` in `heads.py`, which is asked for
quantiles and probabilities, calibrated in `conformal.py` and scored in `scores.py`.
"""
