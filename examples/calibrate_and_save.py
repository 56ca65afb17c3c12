"""Let ranks and bits be chosen for a number of bytes, save the choice, and use it in another program.

python examples/calibrate_and_save.py
"""

import tempfile
from pathlib import Path

from shipped import load, prepared, questions, right

import attnpack_fx
from attnpack_fx import PackPolicy

model, processor = load()
samples = [prepared(processor, [each]) for each in questions(4, seed=1)]
policy = attnpack_fx.calibrate(model, samples, budget=1 / 16)

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "policy.json")
    policy.save(file)
    print(f"the policy is a file of {file.stat().st_size:,} B")
    attnpack_fx.compile(model, policy=PackPolicy.load(file))

asked = questions(4)
output = model.generate(**prepared(processor, asked), return_dict_in_generate=True)
print(f"{right(processor, asked, output.sequences)}, cache {attnpack_fx.cache_bytes(output.past_key_values):,} B")
for number, layer in enumerate(output.past_key_values.layers):
    print(f"layer {number}: ranks of keys {layer.keys.ranks}, of values {layer.values.ranks}")
