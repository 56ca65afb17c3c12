"""Decoding throughput at a fixed memory cap on a CPU: tokens/s of the largest batch that fits, by how the cache is held.

    attnpack bench speed --quick                # a narrow model and a small cap: under 100 seconds
    attnpack bench speed --full --out speed.json

The model is a decoder of transformers with random weights and a few layers of LLaVA-1.5-7B's shape; prompts are 2,048
tokens, of which all but 32 are vision tokens. A cap of 1 GB for two layers is 16 GB for the 32 of the real model.

**What counts against the cap** is resident memory of the process while it decodes, at its peak, beyond what it has with
the model loaded, everything compiled and no cache: the cache, and whatever a step needs besides, such as the dense copy
that a quantised cache decodes into, or the second copy that concatenating makes. Bytes of the cache, counted
(`attnpack_fx.cache_bytes`), stand beside it. Memory is measured with an allocator that gives freed tensors back at
once, time, in further steps of the same process, with one that keeps them: each contender gets the better of both.

**What is not measured** is the prefill, whose activations would hide the cache in a model of few layers. The cache of
one prompt is packed, or quantised, and joined along the batch as often as the batch is large. Contents are random: no
contender's time or memory depends on them.

Every batch of every contender runs in a process of its own, so that peaks and failures do not leak. Contenders take
turns while each looks for its largest batch, and again when that is timed in further processes.
"""
