"""Folders that tests look into."""

from pathlib import Path

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
CONFIGS = HELPERS / "configs"
BENCHMARKS = ROOT / "benchmarks"
SHARED = ROOT.parent / "shared"  # real data, where there are any
