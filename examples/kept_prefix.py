"""Read 16 images once, and ask many questions about them: each continues a fork of one packed cache.

python examples/kept_prefix.py
"""

from shipped import load, questions

import attnpack_fx

model, processor = load()
attnpack_fx.compile(model)
asked = questions(1)[0]
shown, own_question = asked.prompt.split(" question :")
kept = attnpack_fx.prefix(model, **processor(images=[list(asked.images)], text=[shown], return_tensors="pt"))

forks = []
for question in (own_question, *(f" read image #{number} answer :" for number in (1, 2, 3))):
    text = f" question :{question}"
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    output = model.generate(**kept.inputs(ids), return_dict_in_generate=True)
    answer = processor.decode(output.sequences[0, kept.tokens + ids.shape[1] :], skip_special_tokens=True).strip()
    forks.append(output.past_key_values)
    print(f"{text} {answer}{' (right)' if question == own_question and answer == asked.answer else ''}")

together, alone = attnpack_fx.cache_bytes([kept.cache, *forks]), sum(map(attnpack_fx.cache_bytes, forks))
print(f"the prefix: {kept.nbytes:,} B; with {len(forks)} forks {together:,} B; the forks without sharing {alone:,} B")
