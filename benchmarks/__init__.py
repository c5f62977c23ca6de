"""Benchmarks: `python -m benchmarks --help`.

section.py   what a section is, and the choices they all get
photos.py    real photographs through spectral_pool
ops.py       radial_filter against a memory copy and against FFT chains
layers.py    the SPAM layer against the published one and against its own limit
models.py    whole models, inference; train.py: their training step
scaling.py   cost against size, radius, channels, batch, threads and processes

timing.py    interleaved timing on the CPU and on GPUs
limit.py     what the machine can do: copies and matrix products
trace.py     what a call does: matrix products, bytes, memory, where its time goes, energy
peers.py     what SPANet is compared with
record.py    the environment of a run, results as JSON files, one against an older one

tables.py model_tables.py figures.py model_figures.py report.py    tables, figures and pages from the JSON alone
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports missing GPUs otherwise
