"""Measurements: each `bench_*.py` is a program; small with `--small`, as in every CI run, full by `make bench`."""
