"""Tokens: how they are sampled, how candidates are scored, and the loop that writes them."""
