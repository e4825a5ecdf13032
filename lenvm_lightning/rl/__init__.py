"""Reinforcement learning with a length value model as a critic of length, and what else makes policies write less.

Pure functions on tensors, torch alone: rewards and advantages of tokens in `signals.py`, rewards of whole completions,
as others give them, in `sequence_rewards.py`.
"""
