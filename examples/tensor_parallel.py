"""Share the heads of every layer among processes: each packs its own.

pip install "attnpack-fx[distributed]"
torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

import torch
from shipped import load, prepared, questions, right
from transformers.distributed import DistributedConfig

import attnpack_fx

model, processor = load(distributed_config=DistributedConfig(tp_plan="auto"))
attnpack_fx.compile(model, vision_rank=64)
asked = questions(4)
output = model.generate(**prepared(processor, asked), return_dict_in_generate=True)

cache, everyone = output.past_key_values, torch.distributed.group.WORLD
alone, together = attnpack_fx.cache_bytes(cache), attnpack_fx.cache_bytes(cache, group=everyone)
heads, ranks = cache.layers[0].keys.shape[1], cache.layers[0].keys.ranks
if torch.distributed.get_rank() == 0:
    print(right(processor, asked, output.sequences))
    print(f"{heads} heads of each layer in this process, ranks {ranks}: {alone:,} B; in all processes {together:,} B")
torch.distributed.destroy_process_group()
