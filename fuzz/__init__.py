"""Fuzzers of everything that is read from outside: `scripts/fuzz` runs them, `docs/fuzzing.md` explains them.

`targets/` has one module per format, `guard.py` says what counts as a finding, `feed.py` and `edits.py` make hostile input out of the
fuzzer's bytes, `engine.py` is the only file that knows atheris, `regressions/` keeps what was found.
"""
