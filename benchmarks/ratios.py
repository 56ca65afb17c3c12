"""How many times fewer bytes the calibrated policies of the evaluation hold, in a batch of 12 and for one prompt.

    python -m benchmarks.ratios

Policies are those in `benchmarks/results/evaluation`, prompts those they were measured on. The model is compiled with
Inductor and reads the prompts; the bytes are `cache_bytes` of its whole cache then. A batch shares cos, sin and places
of tokens among its samples; one prompt has them to itself.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch

import attnpack_fx
from attnpack_fx import PackPolicy, cache_bytes
from benchmarks import results_file
from benchmarks.quality.contexts import contexts
from benchmarks.trained import MODELS, load_trained

GROUP = "ours, calibrated"
BATCHES = (12, 1)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"| model | policy | {' | '.join(f'batch {size}' for size in BATCHES)} |\n|{' --- |' * (2 + len(BATCHES))}")
    for name in MODELS:
        for policy, ratios in measured(name):
            print(f"| {name} | {policy} | {' | '.join(f'{ratio:.2f}x' for ratio in ratios)} |", flush=True)


def measured(name: str) -> Iterator[tuple[str, list[float]]]:
    """The name of each calibrated policy of a model, and dense bytes over packed ones, by batch."""
    record = json.loads((results_file.FOLDER / f"quality-{name}.json").read_text())
    loaded = load_trained(name, record["dtype"])
    batches = [contexts(loaded, record["images"], size, size, record["seed"])[0] for size in BATCHES]
    dense = [held(loaded.model, batch) for batch in batches]
    for row in record["rows"]:
        if row["group"] == GROUP and "policy" in row:
            torch._dynamo.reset()
            attnpack_fx.compile(loaded.model, policy=PackPolicy.from_dict(row["policy"]))
            packed = [held(loaded.model, batch) for batch in batches]
            yield row["name"], [whole / part for whole, part in zip(dense, packed, strict=True)]


@torch.no_grad()
def held(model: Any, batch: Any) -> int:
    """Bytes of the cache after the prompts of a batch."""
    with attnpack_fx.modality(batch.vision):
        out = model(**batch.inputs, use_cache=True)
    return cache_bytes(out.past_key_values)


if __name__ == "__main__":
    main()
