"""The default options as a user runs them, beside other ranks: how fast on a mid-size LLaVA, what trained models lose.

    python -m benchmarks.default [--quick] [--out FILE]

Speed: `generate()` with one image of 576 tokens, fp32, eager, compiled by Inductor with a dense cache, and compiled by
`attnpack_fx.compile`, in turn. Fidelity: the trained models answer with the same settings through Inductor, one prompt
at a time: the Kullback-Leibler divergence of each next token from the dense model's, and right answers.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import attnpack_fx
from attnpack_fx import PackPolicy, cache_bytes, hf
from benchmarks import measure, results_file
from benchmarks.quality import score
from benchmarks.quality.answering import answers
from benchmarks.quality.contexts import contexts
from benchmarks.trained import MODELS, load_trained

#: Policies by the name they have in tables. The first is what `attnpack_fx.compile(model)` does.
SETTINGS = {
    "default options": PackPolicy(),
    "vision_rank=64": PackPolicy(vision_rank=64),
    "vision_rank=(16, 64)": PackPolicy(vision_rank=(16, 64)),
    'vision_rank=64, key_space="rotated"': PackPolicy(vision_rank=64, key_space="rotated"),
}
EAGER, INDUCTOR = "eager", "Inductor, dense cache"
IMAGE_TOKENS, TEXT_TOKENS = 576, 32
_IMAGE, _VOCABULARY = 31_999, 32_000
#: Generations before those that are timed: the first compiles, the second has seen every length that changes.
_WARMUP = 2
_SEED = 0


def mid_size(layers: int = 8, heads: int = 16, dim: int = 64) -> Any:
    """A LLaVA with random weights, fp32, whose images have 576 tokens."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=heads * dim,
        intermediate_size=heads * dim * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=dim,
        pad_token_id=0,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=_IMAGE, image_seq_length=IMAGE_TOKENS
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def prompt(batch: int) -> dict[str, Tensor]:
    """One image among text, for each sample another."""
    random = torch.Generator().manual_seed(1)
    text = torch.randint(3, _IMAGE, (batch, TEXT_TOKENS), generator=random)
    ids = torch.cat([text[:, :5], torch.full((batch, IMAGE_TOKENS), _IMAGE), text[:, 5:]], 1)
    pixels = torch.randn(batch, 3, 336, 336, generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class _Clock(transformers.StoppingCriteria):
    """Stops nothing; notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def generation(model: Any, inputs: dict[str, Tensor], tokens: int) -> dict[str, float]:
    """Seconds to the first token, tokens per second after it over all samples, and bytes of the cache at the end."""
    clock, began = _Clock(), time.perf_counter()
    out = model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
    )
    later = clock.times[-1] - clock.times[0]
    return {
        "first_token": clock.times[0] - began,
        "tokens_per_second": inputs["input_ids"].shape[0] * (tokens - 1) / later,
        "bytes": cache_bytes(hf.cache_of(out)),
    }


def speed(model: Any, batch: int, tokens: int, rounds: int) -> dict[str, dict[str, Any]]:
    """By contender: medians and samples of what `generation` says, in `rounds` turns."""
    torch._dynamo.reset()
    inputs = prompt(batch)
    contenders = {EAGER: model, INDUCTOR: copy.copy(model)}
    contenders[INDUCTOR].compile()
    for name, policy in SETTINGS.items():
        contenders[name] = attnpack_fx.compile(copy.copy(model), policy=replace(policy, strict=True))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    # Contenders share forward's code, which must not count as one function recompiled too often.
    with torch._dynamo.config.patch(recompile_limit=64):
        for each in contenders.values():
            for _ in range(_WARMUP):
                generation(each, inputs, 6)
        for _ in range(rounds):
            for name, each in contenders.items():
                found[name].append(generation(each, inputs, tokens))
    keys = ("first_token", "tokens_per_second", "bytes")
    return {
        name: {key: measure.summary([sample[key] for sample in samples]) for key in keys}
        for name, samples in found.items()
    }


def fidelity(name: str, images: int, count: int) -> dict[str, dict[str, Any]]:
    """By setting: what `score.row` says of the trained model's answers about `count` prompts, one at a time."""
    loaded = load_trained(name, "float32")
    model = loaded.model
    asked = [(batch, answers(model, model, batch)) for batch in contexts(loaded, images, count, 1, _SEED)]
    exact = score.Tally()
    for batch, dense in asked:
        exact.add(batch, dense, dense)
    found = {}
    for setting, policy in SETTINGS.items():
        torch._dynamo.reset()
        own = score.Tally()
        packed = attnpack_fx.compile(copy.copy(model), policy=replace(policy, strict=True))
        with torch._dynamo.config.patch(recompile_limit=64):
            for batch, dense in asked:
                own.add(batch, answers(packed, packed, batch, dense), dense)
        found[setting] = score.row(own, exact, _SEED)
    return found


def table(record: dict[str, Any]) -> str:
    """Markdown: of every contender its speed against the fastest dense one at each batch, and its fidelity."""
    batches, models = list(record["speed"]), list(record["fidelity"])
    head = ["setting"]
    for batch in batches:
        head += [f"batch {batch}: first token", "tokens/s", "of the fastest dense", "cache"]
    for model in models:
        head += [f"{model}: KL, nats", "points from dense", "smaller"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name in (EAGER, INDUCTOR, *SETTINGS):
        cells = [name]
        for batch in batches:
            rows = record["speed"][batch]
            fastest = max(rows[dense]["tokens_per_second"]["median"] for dense in (EAGER, INDUCTOR))
            own = {key: value["median"] for key, value in rows[name].items()}
            cells += [f"{own['first_token']:.3f} s", f"{own['tokens_per_second']:.1f}"]
            cells += [f"{own['tokens_per_second'] / fastest:.2f}x", f"{own['bytes'] / 1e6:.1f} MB"]
        for model in models:
            row = record["fidelity"][model].get(name)
            cells += ["0", "0", "1.0x"] if row is None else _lost(row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _lost(row: dict[str, Any]) -> list[str]:
    low, high = row["difference_interval"]
    points = f"{100 * row['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    return [f"{row['kl']:.1e}", points, f"{row['prompt_ratio']:.1f}x"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, few tokens and prompts")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path, help="a JSON file of all samples")
    parser.add_argument("--only", choices=("speed", "fidelity"), help="one half; the other is what the file has")
    given = parser.parse_args(arguments)
    record = results_file.begin(given.out, {"what": "default options", "quick": given.quick})
    for half in ("speed", "fidelity"):
        record.setdefault(half, {})
    if given.only != "fidelity":
        _fill_speed(record, given)
    if given.only != "speed":
        _fill_fidelity(record, given)
    print(table(record))


def _fill_speed(record: dict[str, Any], given: argparse.Namespace) -> None:
    model = mid_size(2, 2) if given.quick else mid_size()
    for batch in given.batches:
        record["speed"][str(batch)] = speed(model, batch, *((4, 1) if given.quick else (33, 5)))
        results_file.write(given.out, record)


def _fill_fidelity(record: dict[str, Any], given: argparse.Namespace) -> None:
    make: Callable[[str], Any] = lambda name: fidelity(name, *((4, 1) if given.quick else (16, 8)))  # noqa: E731
    for name in list(MODELS)[: 1 if given.quick else None]:
        record["fidelity"][name] = make(name)
        results_file.write(given.out, record)


if __name__ == "__main__":
    measure.restart_with_malloc_settings()
    main()
