"""Measurements and endurance tests that are too long for the test run.

`python -m bench` measures all that has a bar; `python -m bench.kill` and `python -m bench.fuzz` endure.
"""
