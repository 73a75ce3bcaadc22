"""Measurements, one module per question. `benchmarks/run --help` lists them; `benchmarks/README.md` says how they are made."""
