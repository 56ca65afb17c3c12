"""Run by torchrun: a model shared by tensor-parallel processes generates under every policy of a file.

Every process writes, by policy: its tokens, what its keys hold, and bytes.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.distributed import DistributedConfig

import attnpack_fx
from attnpack_fx import PackedTensor, PackPolicy, cache_bytes, hf
from tests.zoo import ZOO

TOKENS = 12


def generated(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **settings)
    cache = hf.cache_of(output)
    keys = [layer.keys for layer in cache.layers]
    return {
        "tokens": output.sequences.tolist(),
        "finite": bool(torch.stack(output.logits).isfinite().all()),
        "packed": all(isinstance(key, PackedTensor) for key in keys),
        "heads": keys[0].shape[1],
        "ranks": [getattr(key, "ranks", {}) for key in keys],
        "bytes": cache_bytes(cache),
    }


def main(family: str, folder: str) -> None:
    found = {}
    for name, fields in json.loads(Path(folder, "policies.json").read_text()).items():
        torch._dynamo.reset()
        model = type(ZOO[family].build("sdpa")).from_pretrained(
            folder, distributed_config=DistributedConfig(tp_plan="auto"), attn_implementation="sdpa"
        )
        model = attnpack_fx.compile(model.eval(), policy=PackPolicy.from_dict(fields))
        found[name] = generated(model, ZOO[family].inputs(2, 3))
    report = attnpack_fx.explain(model, policy=PackPolicy.from_dict(fields), **ZOO[family].inputs(2, 3))
    found["explained"] = {name: each for name, each in report.items() if "bytes" in name or name == "processes"}
    found["explained"]["text"] = str(report)
    rank = torch.distributed.get_rank()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
