"""The command line of the comparison, and the file of results, which is continued where it exists."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from attnpack_fx import hf
from attnpack_fx.cache_bytes import cache_bytes
from attnpack_fx.passes.storage import KeySpace
from attnpack_fx.policy import PackPolicy
from benchmarks import measure, results_file
from benchmarks.arguments import part, positive
from benchmarks.graphs import compiled, op_by_op
from benchmarks.quality import methods, score
from benchmarks.quality.agreement import compared, identity
from benchmarks.quality.answering import Answers, answers, prefilled
from benchmarks.quality.contexts import TASKS, Contexts, contexts, prompts
from benchmarks.quality.spectra import spectra
from benchmarks.trained import MODELS, load_trained

_CALIBRATION_PROMPTS = 4
#: Contexts whose singular values are averaged.
_OF_SPECTRA = 4
#: No number of a context that is asked: contexts are seeded with `[seed, number]`.
_CALIBRATION_SEED = 20_001


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    threads = given.threads or torch.get_num_threads()
    if given.model:
        torch.set_num_threads(threads)
        with op_by_op():
            Comparison(given.model, given).run()
    else:
        _together(list(arguments if arguments is not None else sys.argv[1:]), max(1, threads // len(MODELS)))


def _together(arguments: list[str], threads: int) -> None:
    """Every model in a process of its own, since most of the time is spent tracing graphs, in one thread."""
    path = os.pathsep.join([str(measure.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    running = {}
    for name in MODELS:
        command = [sys.executable, "-m", "benchmarks.quality", *arguments, f"--model={name}", f"--threads={threads}"]
        running[name] = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    failed = [name for name, process in running.items() if process.wait()]
    if failed:
        raise SystemExit(f"attnpack bench quality: failed on {', '.join(failed)}; run again to go on from there")


class Comparison:
    """All candidates on one model."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        self.given = given
        self.path = given.out / f"quality-{name}.json"
        own = {
            "model": name,
            "architecture": MODELS[name],
            "dtype": given.dtype,
            "seed": given.seed,
            "images": given.images,
            "contexts": given.contexts,
        }
        self.record = results_file.begin(self.path, own)
        self.loaded = load_trained(name, given.dtype)
        self._asked: list[tuple[Contexts, Answers]] = []

    def run(self) -> None:
        from tqdm import tqdm

        todo = [each for each in methods.candidates() if not self.given.quick or each.quick]
        todo = [each for each in todo if not self.given.only or each.group in self.given.only]
        missing = [each for each in todo if self._known(each) is None]
        study = methods.Study(self.loaded.model, self._shape(), self._samples, self._beside)
        print(f"\n{self.record['model']}: {self.record['contexts']} contexts of {self.record['images']} images")
        with tqdm(total=len(missing), unit="policy", file=sys.stderr, disable=None) as progress:
            self._measure_dense(max((each.weight for each in missing), default=0), progress)
            for candidate in missing:
                progress.set_description_str(f"{candidate.group}: {candidate.name}")
                row = {"group": candidate.group, "name": candidate.name, "target": candidate.target}
                self.record["rows"].append({**row, **self._row(study, candidate)})
                results_file.write(self.path, self.record)
                progress.update()
        for candidate in todo:
            print(_line(self._known(candidate)))
        committed = results_file.FOLDER / self.path.name
        if self.path.resolve() != committed and committed.exists():
            print(f"\nBeside {committed.relative_to(measure.ROOT)}:")
            print(compared(self.record["rows"], json.loads(committed.read_text())["rows"]))

    def _known(self, candidate: methods.Candidate) -> dict[str, Any] | None:
        own = candidate.group, candidate.name, candidate.target
        return next((row for row in self.record["rows"] if identity(row) == own), None)

    def _shape(self) -> methods.Shape:
        config = self.loaded.model.config.get_text_config()
        (batch,) = contexts(self.loaded, self.given.images, 1, 1, self.given.seed)
        vision, tokens = int(batch.vision.sum()), batch.vision.shape[1]
        width = config.num_key_value_heads * config.head_dim
        return methods.Shape(config.num_hidden_layers, width, vision, tokens - vision)

    def _samples(self) -> list[dict[str, Any]]:
        return prompts(self.loaded, self.given.images, _CALIBRATION_PROMPTS, _CALIBRATION_SEED)

    @lru_cache  # noqa: B019  (one comparison a process)
    def _beside(self, space: KeySpace) -> float:
        """What a cache holds besides its factors, as a share of the dense cache."""
        batch, dense = self._batches(1)[0]
        cache, shape = hf.empty_cache(self.loaded.model), self._shape()
        policy = PackPolicy(vision_rank=1, text_rank=1, key_space=space)
        prefilled(compiled(self.loaded.model, policy), batch, cache)
        factors = shape.layers * 2 * (shape.tokens + 2 * shape.width) * self.loaded.model.dtype.itemsize
        return (cache_bytes(cache) - batch.size * factors) / dense.prompt_bytes

    def _batches(self, weight: int) -> list[tuple[Contexts, Answers]]:
        """Contexts with the dense model's answers; the first are the same whatever `weight` is."""
        given = self.given
        count = given.contexts * weight
        if len(self._asked) * given.batch < count:
            drawn = contexts(self.loaded, given.images, count, given.batch, given.seed)
            model = self.loaded.model
            self._asked += [(batch, answers(model, model, batch)) for batch in drawn[len(self._asked) :]]
        return self._asked[: count // given.batch]

    def _measure_dense(self, weight: int, progress: Any) -> None:
        if not weight:
            return
        progress.set_description_str("dense")
        weight = weight if not self.given.quick else 1
        if "dense" not in self.record:
            asked = self._batches(weight)
            tally = _tally((batch, dense, dense) for batch, dense in asked)
            found = score.row(tally, tally, self.given.seed)
            kept = ("accuracy", "accuracy_interval", "exact", "rouge_l", "tasks", "long")
            self.record["dense"] = {
                **{key: found[key] for key in kept},
                "contexts": len(tally.nll),
                "bytes_per_context": tally.prompt_bytes / len(tally.nll),
            }
        if "spectra" not in self.record:
            few = contexts(self.loaded, self.given.images, _OF_SPECTRA, _OF_SPECTRA, self.given.seed)[0]
            self.record["spectra"] = spectra(self.loaded.model, few)
        results_file.write(self.path, self.record)

    def _row(self, study: methods.Study, candidate: methods.Candidate) -> dict[str, Any]:
        began = time.monotonic()
        try:
            policy = candidate.make(study)
            asked = self._batches(1 if self.given.quick else candidate.weight)
            found = self._scored(policy, asked)
        except (methods.UnreachableError, NotImplementedError, RuntimeError, ValueError) as error:
            # One method that cannot be measured must not cost the others; the report lists it with the reason.
            return {"skipped": f"{type(error).__name__}: {error}"}
        return {
            "policy": policy.to_dict(),
            "contexts": len(asked) * self.given.batch,
            **found,
            "seconds": round(time.monotonic() - began, 1),
        }

    def _scored(self, policy: PackPolicy, asked: Sequence[tuple[Contexts, Answers]]) -> dict[str, Any]:
        model = self.loaded.model
        torch._dynamo.reset()
        step = compiled(model, replace(policy, strict=True))
        own = _tally((batch, answers(model, step, batch, dense), dense) for batch, dense in asked)
        dense = _tally((batch, dense, dense) for batch, dense in asked)
        return score.row(own, dense, self.given.seed)


def _tally(triples: Any) -> score.Tally:
    tally = score.Tally()
    for batch, given, dense in triples:
        tally.add(batch, given, dense)
    return tally


def _line(row: dict[str, Any] | None) -> str:
    assert row is not None
    target = f"1/{row['target']}" if row["target"] else ""
    head = f"{row['group']:<28}{row['name']:<38}{target:>5}"
    if "skipped" in row:
        return f"{head} skipped: {row['skipped']}"
    low, high = row["difference_interval"]
    difference = f"{100 * row['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    tasks = " ".join(f"{100 * row['tasks'][task]['accuracy']:6.1f}" for task in TASKS)
    return (
        f"{head}{row['prompt_ratio']:>7.1f}x{100 * row['accuracy']:>8.2f}{difference:>24}{row['kl']:>10.1e}"
        f"{row['long']['perplexity']:>8.2f}  {tasks}"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = part("quality", __doc__, "few policies and contexts")
    parser.add_argument("--out", type=Path, default=results_file.FOLDER, metavar="FOLDER", help="(%(default)s)")
    parser.add_argument("--model", choices=MODELS, help="this model alone (all, at once)")
    parser.add_argument("--only", action="append", metavar="GROUP", help="this group; may be given several times")
    parser.add_argument("--contexts", type=positive, help="held-out prompts (12)")
    parser.add_argument("--images", type=positive, default=16, help="in a prompt (16)")
    parser.add_argument("--batch", type=positive, help="contexts answered together (12)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model (bfloat16)")
    parser.add_argument("--seed", type=int, default=2)
    given = parser.parse_args(arguments)
    given.contexts = given.contexts or 12
    given.batch = given.batch or 12
    if given.contexts % given.batch:
        parser.error(f"--contexts: got {given.contexts}, expected a multiple of --batch, {given.batch}")
    return given
