"""A command, not tests: tests/statistics/test_coverage.py runs a small version of it."""

collect_ignore_glob = ["*.py"]
