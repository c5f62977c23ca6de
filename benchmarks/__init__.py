"""Benchmarks: `python -m benchmarks --help`.

timing.py    interleaved timing on the CPU and on GPUs
record.py    the environment of a run, and results as JSON
ops.py       radial_filter against a memory copy and against FFT chains
photos.py    real photographs through spectral_pool
report.py    targets and tables from the JSON alone
figures.py   figures from the JSON alone
"""
