"""Decode steps of exported artefacts in ONNX Runtime on a CPU: packed against dense exports of the same model.

    python -m benchmarks.exported                                   # T = 2k, 8k; one thread
    python -m benchmarks.exported --tokens 2048 --out exported.json

A decoder with random weights is exported by `export_onnx` with each policy, and one decode step is timed, a batch of
one, over a cache of T tokens with `PAST` generated ones behind it: contenders take turns, medians are given. The cache
holds random numbers; what a step takes does not depend on them. Dense contenders: the cache kept apart from what grows,
as in packed artefacts, so that no step copies it; and all of it in `past_key_values`, which every step copies, as
exports commonly have it. Memory is that of a process that loads the decode step and runs it a few times: resident at
the end and at most, besides what it has before it loads the step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from attnpack_fx import PackPolicy, Quantize
from attnpack_fx.export import export_onnx, manifest
from attnpack_fx.export.runtime.onnxruntime_session import OnnxRuntimeSession
from attnpack_fx.export.signature import TensorSpec
from benchmarks import measure

#: Generated tokens behind the prompt.
PAST = 32
STEPS = 8
CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 4096,
    "max_position_embeddings": 32768,
}


@dataclass(frozen=True)
class Contender:
    """policy: what its artefact packs. grows: whether all its cache is in `past_key_values`."""

    policy: PackPolicy
    grows: bool = False


CONTENDERS = {
    "dense, past copied": Contender(PackPolicy(vision_rank=None), grows=True),
    "dense": Contender(PackPolicy(vision_rank=None)),
    "packed, rank 64": Contender(PackPolicy(text_rank=64, key_space="rotated")),
    "packed, rank 64, 8 bits": Contender(
        PackPolicy(text_rank=64, key_space="rotated", passes=(Quantize(bits=8),)),
    ),
    "packed, rank 64, 4 bits": Contender(
        PackPolicy(text_rank=64, key_space="rotated", passes=(Quantize(bits=4),)),
    ),
    "packed, rank 16, un-rotated": Contender(PackPolicy(text_rank=16, key_space="unrotated")),
}


def exported(folder: Path) -> dict[str, Path]:
    """An artefact of every policy, and where it is, by contender."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    written: dict[PackPolicy, Path] = {}
    for contender in CONTENDERS.values():
        if contender.policy not in written:
            written[contender.policy] = export_onnx(model, contender.policy, folder / str(len(written)))
    return {name: written[contender.policy] for name, contender in CONTENDERS.items()}


def step_of(artefact: Path, grows: bool, tokens: int, threads: int) -> tuple[Callable[[], dict[str, Tensor]], int]:
    """One decode step, and the bytes of the cache it reads."""
    described = manifest.read(artefact)
    step = described.steps["decode"]
    session = OnnxRuntimeSession("decode", step, artefact / step.file, threads, None)
    packs = "text_mask" in {spec.name for spec in step.inputs}
    sizes = {
        "batch_size": 1,
        "sequence_length": 1,
        "past_sequence_length": PAST + (tokens if grows else 0),
        "prompt_length": 0 if grows or packs else tokens,
        "text_length": tokens,
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {spec.name: _filled(spec, sizes, generator) for spec in step.inputs}
    changing = ("input_ids", "attention_mask", "position_ids", "past_key_values")
    given = {name: tensor for name, tensor in tensors.items() if name.startswith(changing)}
    held = session.hold({name: tensor for name, tensor in tensors.items() if name not in given})
    cache = sum(tensor.nbytes for name, tensor in tensors.items() if name not in changing)
    return lambda: session.run(given, held), cache


def _filled(spec: TensorSpec, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
    shape = spec.resolved(sizes)
    if spec.dtype == torch.int64:
        return torch.ones(shape, dtype=torch.int64)
    if not spec.dtype.is_floating_point:
        return torch.randint(0, 100, shape, generator=generator, dtype=spec.dtype)
    return 0.05 * torch.randn(shape, generator=generator, dtype=spec.dtype)


def timed(artefacts: dict[str, Path], tokens: int, threads: int, rounds: int) -> dict[str, Any]:
    steps, caches = {}, {}
    for name, artefact in artefacts.items():
        steps[name], caches[name] = step_of(artefact, CONTENDERS[name].grows, tokens, threads)
    repeats = {name: measure.repeats_for(step, 0.25) for name, step in steps.items()}
    samples = measure.in_turn(steps, rounds, repeats)
    dense = measure.summary(samples["dense"])["median"]
    found = {}
    for name, of in samples.items():
        told = measure.summary(of)
        memory = _memory_of(artefacts[name], CONTENDERS[name].grows, tokens, threads)
        found[name] = {
            "seconds": told,
            "tokens_per_second": 1 / told["median"],
            "times_dense": dense / told["median"],
            "cache_bytes": caches[name],
            **memory,
        }
    return found


def _memory_of(artefact: Path, grows: bool, tokens: int, threads: int) -> dict[str, int]:
    """Resident bytes of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.exported", "--memory-of", str(artefact), "--tokens", str(tokens)]
    command += ["--threads", str(threads), *(["--grows"] if grows else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=measure.ROOT)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def report_memory(artefact: Path, grows: bool, tokens: int, threads: int) -> dict[str, int]:
    before = measure.resident()
    step, _ = step_of(artefact, grows, tokens, threads)
    for _ in range(STEPS):
        step()
    return {"resident_bytes": measure.resident() - before, "peak_bytes": measure.resident(peak=True) - before}


def table(tokens: int, found: dict[str, Any]) -> str:
    lines = [
        f"T = {tokens}",
        f"{'':30} {'tokens/s':>10} {'x dense':>8} {'cache MB':>10} {'resident MB':>12} {'peak MB':>9}",
    ]
    for name, of in found.items():
        cache, resident, peak = (of[each] / 1e6 for each in ("cache_bytes", "resident_bytes", "peak_bytes"))
        speed = f"{of['tokens_per_second']:10.1f} {of['times_dense']:8.2f}"
        lines.append(f"{name:30} {speed} {cache:10.1f} {resident:12.0f} {peak:9.0f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Decode steps of exported artefacts in ONNX Runtime on a CPU.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], metavar="T")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--memory-of", type=Path, metavar="ARTEFACT", help=argparse.SUPPRESS)
    parser.add_argument("--grows", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.memory_of is not None:
        print(json.dumps(report_memory(given.memory_of, given.grows, given.tokens[0], given.threads)))
        return
    results: dict[str, Any] = {"environment": measure.environment(), "threads": given.threads, "model": CONFIG}
    with tempfile.TemporaryDirectory() as folder:
        artefacts = exported(Path(folder))
        for tokens in given.tokens:
            results[str(tokens)] = timed(artefacts, tokens, given.threads, given.rounds)
            print(table(tokens, results[str(tokens)]), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
