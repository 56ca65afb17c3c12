"""Made-up result files of every kind that `benchmarks.report` reads. They look like measurements and are none.

python tests/benchmarks/report_inputs.py FOLDER        # to look at a page while working on it
"""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

TASKS = ("read", "dialogue", "cell", "count", "needle")
#: Group, what its names begin with, how much of the accuracy of the dense cache is gone at 16x.
GROUPS = (
    ("ours, calibrated", "calibrated", 0.0004),
    ("ours, composed", "calibrated + 4 bit", 0.0008),
    ("AttentionPack, as published", "rank", 0.02),
    ("AttentionPack, as released", "released, rank", 0.03),
    ("low rank x bits", "rank x bits", 0.008),
    ("quantization", "KIVI", 0.05),
    ("eviction", "H2O", 0.2),
    ("token pruning", "FastV", 0.3),
    ("merging", "MiniCache", 0.4),
    ("pairs", "H2O + KIVI", 0.1),
    ("control", "random", 0.5),
)
TARGETS = (4, 8, 16, 32, 48, 64)
ENVIRONMENT = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.24.0"},
    "cpu": "an invented processor",
    "threads": 2,
    "commit": "0123456789abcdef0123456789abcdef01234567",
}


def quality(model: str, architecture: str, seed: int = 0, loss: float = 1.0) -> dict[str, Any]:
    """loss: of all methods, in units of `GROUPS`."""
    chance = random.Random(f"{model} {seed}")
    dense = 0.962
    rows = [
        _row(chance, dense, group, f"{name} {target}", target, loss * gone)
        for group, name, gone in GROUPS
        for target in (TARGETS if group not in ("merging", "control") else TARGETS[:2])
    ]
    rows.append({"group": "token pruning", "name": "ASAP", "target": 8, "skipped": "tokens are not pruned <here>"})
    return {
        **ENVIRONMENT,
        "model": model,
        "architecture": architecture,
        "contexts": 200,
        "images": 16,
        "dtype": "bfloat16",
        "seed": seed,
        "dense": {
            "bytes_per_context": 12_345_678,
            "accuracy": dense,
            "tasks": {task: {"accuracy": dense, "exact": 0.9, "rouge_l": 0.97} for task in TASKS},
            "long": {"perplexity": 1.08, "accuracy": 0.97},
        },
        "spectra": [
            {
                "layer": layer,
                "kind": kind,
                "energy": [math.exp(-number * speed / (4 + layer)) for number in range(256)],
                "error": {"8": 0.3, "16": 0.1},
                "rank_of_99_percent": 40 / speed,
            }
            for kind, speed in (("keys, rotated", 0.3), ("keys, un-rotated", 1.0), ("values", 0.6))
            for layer in range(4)
        ],
        "rows": rows,
    }


def _row(chance: random.Random, dense: float, group: str, name: str, target: int, at_sixteen: float) -> dict[str, Any]:
    difference = -min(0.9, at_sixteen * (target / 16) ** 1.3) * chance.uniform(0.8, 1.2)
    width = 0.001 + abs(difference) / 6
    score = {
        "accuracy": dense + difference,
        "difference": difference,
        "difference_interval": [difference - width, difference + width],
        "exact": 0.9 + difference,
        "rouge_l": 0.97 + difference,
        "kl": -difference * 0.5,
        "agree": 1 + difference,
        "first_divergence": None if difference > -0.001 else 1 / -difference,
    }
    return {
        "group": group,
        "name": name,
        "target": target,
        "policy": {},
        "prompt_ratio": target * chance.uniform(1.0, 1.05),
        "vision_ratio": target * 1.2,
        **score,
        "accuracy_interval": [dense + difference - 0.01, dense + difference + 0.01],
        "tasks": {task: dict(score) for task in TASKS},
        "long": {
            "perplexity": 1.08 - difference,
            "accuracy": 0.97 + difference,
            "kl": 0.01,
            "first_divergence": 400.0,
            "ratio": target / 2,
        },
        "seconds": 12.5,
    }


def speed() -> dict[str, Any]:
    cap = 1 << 30
    contenders = (
        ("dense, eager", "dense", 3.4e7, 20.0),
        ("static, Inductor", "dense", 3.4e7, 30.0),
        ("quanto 4 bit", "quantised", 2.2e7, 12.0),
        ("ours, rank 64 rotated", "ours", 4.0e6, 28.0),
    )
    rows: list[dict[str, Any]] = []
    best: dict[str, dict[str, float]] = {}
    for name, kind, size, first in contenders:
        for batch in (2, 4, 8, 16, 32, 64, 128, 256, 512):
            peak = int(size * batch)
            if peak > 2.2 * cap:
                break
            held = {"cache_bytes": int(peak * 0.9), "peak_bytes": peak, "tokens_per_second": first * batch**0.7}
            rate = held["tokens_per_second"]
            row = {"contender": name, "kind": kind, "batch": batch, "cap_bytes": cap, **held}
            rows.append({**row, "samples": [batch / rate * part for part in (0.9, 1, 1.1)], "fits": peak <= cap})
            if peak <= cap:
                best[name] = {"batch": batch, **held}
    rows.append({"contender": "hqq 4 bit", "kind": "quantised", "batch": 2, "fits": False, "skipped": "hqq is missing"})
    rows.append({"contender": "fp8", "kind": "quantised", "batch": 2, "fits": False, "failed": "RuntimeError: no fp8"})
    fastest = {"dense": "static, Inductor", "quantised": "quanto 4 bit", "ours": "ours, rank 64 rotated"}
    ratios = {
        f"ratio_to_{kind}": best[fastest["ours"]]["tokens_per_second"] / best[fastest[kind]]["tokens_per_second"]
        for kind in ("dense", "quantised")
    }
    summary = {"best": best, "fastest": fastest, **ratios}
    case = {"hidden": 4096, "heads": 32, "head_dim": 128, "layers": 2, "tokens": 2048, "text": 32, "dtype": "bfloat16"}
    return {**ENVIRONMENT, **case, "cap_bytes": cap, "rows": rows, "summary": summary}


def long() -> dict[str, Any]:
    steps = list(range(0, 4097, 128))
    rows = [
        {"name": name, "policy": {}, "steps": steps, "bytes": [int(start + each * step) for step in steps]}
        for name, start, each in (
            ("dense", 2.4e7, 8192),
            ("packed, text dense", 2e6, 8192),
            ("packed, folds", 2e6, 300),
        )
    ]
    rows.append({"name": "packed, a bound", "policy": {}, "failed": "RuntimeError: out of memory"})
    return {**ENVIRONMENT, "prompts": 8, "images": 4, "tokens": 4096, "every": 128, "rows": rows}


def counted() -> dict[str, Any]:
    shape = {"model": "LLaVA-1.5-7B", "vision_tokens": 576, "text_tokens": 50, "full": 328204288, "besides": {}}
    rows = [
        {**shape, "name": "full", "paper": 328.2, "paper_unit": "MB", "counted": 328204288, "closed_form": 328204288,
         "ratio": 1.0, "difference_per_cent": 0.0},
        {**shape, "name": "64/64", "paper": 5.09, "paper_unit": "x", "counted": 64492432, "closed_form": 64487424.0,
         "ratio": 5.089, "difference_per_cent": 0.0078},
        {**shape, "name": "64/64, vision 4 bit", "paper": None, "paper_unit": "x", "counted": 35820432,
         "closed_form": 35782656.0, "ratio": 9.162, "difference_per_cent": 0.106},
    ]  # fmt: skip
    return {**ENVIRONMENT, "dtype": "fp16", "memory": rows}


def write(folder: Path) -> Path:
    """All of them, of two models, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    records = {
        "quality-digits-llava": quality("digits-llava", "LLaVA, multi-head attention, one position a token"),
        "quality-digits-qwen3-vl": quality("digits-qwen3-vl", "Qwen3-VL, grouped heads, M-RoPE", loss=2.5),
        "speed": speed(),
        "long": long(),
        "counted": counted(),
    }
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]))
