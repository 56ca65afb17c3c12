"""Side-by-side measurements; each module is a command, e.g. `python benchmarks/decode.py`."""
