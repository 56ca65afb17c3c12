"""The parts, in the order in which they run and are shown."""

from benchmarks.gpu import attention, ceilings, coded, correctness, decode, factorize, kernels, launches, paper

PARTS = (
    kernels.PART,
    ceilings.PART,
    correctness.PART,
    attention.PART,
    coded.PART,
    factorize.PART,
    decode.PART,
    paper.PART,
    launches.PART,
)
