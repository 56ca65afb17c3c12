"""Decoding throughput on a CPU at a fixed memory cap: tokens/s of the largest batch that fits, by how a cache is held.

    attnpack bench speed --quick                # a narrower model, a small cap, one contender a kind
    attnpack bench speed --out speed.json

The model is a decoder of transformers with random weights, the same in every layer: eight layers half as wide as
LLaVA-1.5-7B's 32. Prompts are 2,048 tokens, of which all but 32 are vision tokens. A cap of half a GiB is one of 4 GiB
for the real model.

**What counts against the cap** is resident memory of the process while it decodes, at its peak, beyond what it has with
the model loaded, everything compiled and no cache: the cache, and whatever a step needs besides, such as the dense copy
that a quantised cache decodes into, or the second copy that concatenating makes. Such copies are of one layer at a time
where the model runs eagerly, and weigh more here than in a model of more layers. Bytes of the cache, counted
(`attnpack_fx.cache_bytes`), stand beside it. Memory is measured with an allocator that gives freed tensors back at
once, time, in other steps of the same process, with one that keeps them: each contender gets the better of both.

**What is not measured** is the prefill, whose activations would hide the cache in a model of few layers. The cache of
one prompt is packed, and repeated along the batch. Contents are random: neither time nor memory depends on them.
Steps are few enough that no contender quantises or folds anything again while it is timed.

Every batch of every contender runs in a process of its own, so that peaks and failures do not leak. Contenders take
turns while each looks for its largest batch, and again when that is timed in further processes.
"""
