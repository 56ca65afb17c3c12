"""Generate from a packed cache: one line more than without.

python examples/generate.py
"""

from shipped import load, prepared, questions, right

import attnpack_fx

model, processor = load()
asked = questions(4)
inputs = prepared(processor, asked)


def report(name: str) -> None:
    output = model.generate(**inputs, return_dict_in_generate=True)
    size = attnpack_fx.cache_bytes(output.past_key_values)
    print(f"{name}: {right(processor, asked, output.sequences)}, cache {size:,} B")


report("dense")
attnpack_fx.compile(model)  # in place; `model.generate` stays as it is
report("packed")
