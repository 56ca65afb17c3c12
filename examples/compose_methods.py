"""Compose methods, and look at answers and bytes: 4 bits cost nothing here, eviction does, as every digit is asked for.

python examples/compose_methods.py
"""

from shipped import load, prepared, questions, right

from attnpack_fx import H2O, Quantize, cache_bytes, compile

compositions = {
    "low rank": (),
    "low rank, 4 bits": (Quantize(bits=4),),
    "low rank, half the tokens": (H2O(budget=0.5),),
    "low rank, half the tokens, 4 bits": (H2O(budget=0.5), Quantize(bits=4)),
}
asked = questions(4)
for name, methods in compositions.items():
    model, processor = load()
    compile(model, passes=methods)
    output = model.generate(**prepared(processor, asked), return_dict_in_generate=True)
    size = cache_bytes(output.past_key_values)
    print(f"{name}: {right(processor, asked, output.sequences)}, cache {size:,} B")
