"""Command line: ``lightning run RECIPE`` and the same as ``lenvm run``."""
