"""Accuracy against counted bytes on the trained model of `benchmarks/assets`, over many policies.

    python -m benchmarks.quality --out FILE [--quick | --full] [--questions N] [--only SWEEP] [--figure FILE.png]

The dense prefill of every batch of questions runs once. Each policy then packs its keys and values with the operators
that the compiled prefill calls (`packing`), and the compiled decode step generates from the packed cache. Decode graphs
are rewritten as always, and run op by op: no policy changes what is computed after that, and Inductor would take most
of the time. `check` compares this shorter way with a compiled prefill.
"""
