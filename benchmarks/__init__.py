"""The benchmark suite: `pytest benchmarks` measures, `python -m benchmarks.report` renders."""
