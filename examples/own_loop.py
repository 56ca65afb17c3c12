"""Decode in a loop of your own: the cache that comes out of one call goes into the next, packed.

python examples/own_loop.py
"""

import torch
from shipped import load, prepared, questions, right

from attnpack_fx import attnpack_backend, cache_bytes

model, processor = load()
asked = questions(4)
inputs = prepared(processor, asked)
step = torch.compile(model, backend=attnpack_backend, options={"vision_rank": 48})

with torch.no_grad():
    out = step(**inputs, use_cache=True)
    mask, tokens = inputs["attention_mask"], [inputs["input_ids"]]
    for _ in range(len(asked[0].answer.split())):
        tokens.append(out.logits[:, -1:].argmax(-1))
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        out = step(input_ids=tokens[-1], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)

keys = out.past_key_values.layers[0].keys
print(f"{right(processor, asked, torch.cat(tokens, 1))}, cache {cache_bytes(out.past_key_values):,} B")
print(f"keys of the first layer: {type(keys).__name__}, shape {tuple(keys.shape)}, ranks {keys.ranks}")
