"""Memory over a long generation: bytes a cache really holds after every so many of 512 generated tokens.

    attnpack bench memory --quick               # 96 tokens
    attnpack bench memory --out memory.json

The trained model that comes with the repository answers about 16 images, 1,024 vision tokens, held out from its
training, and goes on for as long as asked: the tokens fed are given, random digits, the same for every contender. What
is counted is the whole storage of every tensor of the cache (`attnpack_fx.cache_bytes`): scales, indices, spare room,
and what a quantised cache still holds dense. Beside it stands the peak of resident memory in the last steps.

Rewritten graphs run op by op, without Inductor: it would change no byte of the cache, and take minutes.
"""
