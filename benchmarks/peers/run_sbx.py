"""Run the work of benchmarks/speed.py with SBX: run_sb3.py finds it in its environment."""

import run_sb3  # noqa: F401
