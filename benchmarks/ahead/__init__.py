"""What Inductor would launch on a GPU, found on a machine without one: real graphs, compiled ahead of time, read.

    python -m benchmarks.ahead                  # every case, for compute capabilities 8.0, 9.0 and 10.0
    python -m benchmarks.ahead --help

A case is a transformers model and a setting. It generates on the CPU; every graph that reaches the backend is also
compiled for a CUDA device that is not there (`pretend.py`, `emitted.py`), up to the wrapper that Inductor writes. The
kernels in that wrapper, with its signatures, constants and specialisations, are then compiled (`compiled.py`).
"""
