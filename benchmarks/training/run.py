"""A training run: two phases, an averaged model, checks on held-out digits, a state to resume from."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig

from attnpack_fx.demo import digits
from benchmarks.training.batches import CURRICULUM, Batch, BatchMaker
from benchmarks.training.families import FAMILIES, Family, make_tokenizer, patch_cells

log = logging.getLogger(__name__)

VISION_SHARE = 0.13
VISION_BATCH = 64
LEARNING_RATES = {"vision": 2e-3, "decoder": 1e-3}
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 100
AVERAGE_DECAY = 0.998


def answer_logits(family: Family, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[batch, answers, vocabulary]`` in float32 and the expected tokens ``[batch, answers]``."""
    ids = batch.input_ids[:, :-1]
    if batch.mask is None:
        mask = torch.ones_like(ids)
    else:
        mask = batch.mask[None, None, :-1, :-1]
    embedded = model.get_input_embeddings()(ids)
    images = family.features(model, batch.grey).flatten(0, 1).to(embedded.dtype)
    where = (ids == model.config.image_token_id)[:, :, None].expand_as(embedded)
    hidden = model.model.language_model(
        inputs_embeds=embedded.masked_scatter(where, images),
        attention_mask=mask,
        position_ids=family.positions(batch.positions[:, :, :-1]),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[:, batch.asked]).float(), batch.input_ids[:, batch.asked + 1]


class Run:
    """The state of a training run.

    Args:
        family: name of the architecture.
        out: folder of the finished model.
        minutes: training time.
        seed: of the weights and the data.
        state_path: file to save to and resume from, if any.
        start: folder of a trained model to go on from, if any.
    """

    def __init__(
        self, family: str, out: Path, minutes: float, seed: int, state_path: Path | None, start: Path | None
    ) -> None:
        self.family = FAMILIES[family]()
        self.out = out
        self.total = minutes * 60.0
        self.state_path = state_path
        torch.manual_seed(seed)
        self.tokenizer = make_tokenizer()
        self.model = self.family.make(self.tokenizer)
        if start is not None:
            self.model.load_state_dict(type(self.model).from_pretrained(start, dtype=torch.float32).state_dict())
        self.head = nn.Linear(self.model.config.text_config.hidden_size, 10)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.average_head = copy.deepcopy(self.head).requires_grad_(False)
        self.seed = seed
        self.elapsed = 0.0
        self.step = 0
        self.phase_step = 0
        self.phase = "vision" if start is None else "decoder"
        self.stage = 0 if start is None else len(CURRICULUM) - 1
        self.vision_share = VISION_SHARE if start is None else 0.0
        self.optimizer = self._optimizer()
        self.records: list[dict[str, Any]] = []
        if state_path is not None and state_path.exists():
            self._resume(state_path)
        self.batches = BatchMaker(self.family, self.tokenizer, "train", [seed, 1, self.step])

    def _trained(self) -> Iterator[nn.Module]:
        yield self.family.projector(self.model)
        if self.phase == "vision":
            yield self.family.tower(self.model)
            yield self.head
        else:
            yield self.model.model.language_model
            yield self.model.lm_head

    def _optimizer(self) -> torch.optim.AdamW:
        self.model.requires_grad_(False)
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for module in self._trained():
            module.requires_grad_(True)
            for parameter in module.parameters():
                (decayed if parameter.ndim > 1 else plain).append(parameter)
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=LEARNING_RATES[self.phase], betas=(0.9, 0.98))

    @property
    def progress(self) -> float:
        """Share of the present phase that is over, in [0, 1]."""
        if self.phase == "vision":
            return min(1.0, self.elapsed / (self.vision_share * self.total))
        return min(1.0, (self.elapsed / self.total - self.vision_share) / (1.0 - self.vision_share))

    def _learning_rate(self) -> float:
        warm = min(1.0, (self.phase_step + 1) / WARMUP_STEPS)
        if self.phase == "vision":
            shape = 0.5 * (1.0 + math.cos(math.pi * self.progress))
        else:
            shape = min(1.0, 0.5 * (1.0 + math.cos(math.pi * max(0.0, self.progress - 0.4) / 0.6)))
        return LEARNING_RATES[self.phase] * warm * max(0.01, shape)

    def _update(self, loss: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        self.phase_step += 1
        decay = min(AVERAGE_DECAY, (1 + self.phase_step) / (10 + self.phase_step))
        with torch.no_grad():
            for kept, live in ((self.average, self.model), (self.average_head, self.head)):
                for target, source in zip(kept.parameters(), live.parameters(), strict=True):
                    if source.requires_grad:
                        target.lerp_(source, 1.0 - decay)

    def _vision_step(self) -> tuple[float, float]:
        pixels, labels = digits.sample_grids(self.batches.rng, VISION_BATCH, "train")
        expected = torch.from_numpy(labels)[:, patch_cells()].reshape(-1)
        logits = self.head(self.family.features(self.model, pixels))
        logits = logits.float().reshape(-1, 10)
        loss = functional.cross_entropy(logits, expected, label_smoothing=0.05)
        self._update(loss)
        right = (logits.detach().argmax(-1) == expected).float().mean()
        return float(loss.detach()), float(right)

    def _decoder_step(self) -> tuple[float, float, int]:
        images, batch = self.batches.draw_stage(CURRICULUM[self.stage])
        logits, expected = answer_logits(self.family, self.model, batch)
        losses = functional.cross_entropy(logits.transpose(1, 2), expected, reduction="none")
        loss = (losses * batch.weights).sum() / (batch.weights.sum() * len(expected))
        self._update(loss)
        right = (logits.detach().argmax(-1) == expected).float()
        plain = expected != self.batches.eos
        return float(loss.detach()), float(right[plain].mean()), images

    def _start_decoder(self) -> None:
        """Take over the averaged vision weights, bring the features to the scale of words, switch phase."""
        self.model.load_state_dict(self.average.state_dict())
        with torch.no_grad():
            pixels, _ = digits.sample_grids(self.batches.rng, VISION_BATCH, "train")
            scale = 0.3 / self.family.features(self.model, pixels).square().mean().sqrt()
            self.family.last_projection(self.model).weight.mul_(scale)
            self.family.last_projection(self.model).bias.mul_(scale)
        self.average.load_state_dict(self.model.state_dict())
        self.phase = "decoder"
        self.phase_step = 0
        self.optimizer = self._optimizer()

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Accuracy of the averaged weights on held-out digits, answers given (teacher forcing)."""
        result: dict[str, float] = {}
        if self.phase == "vision":
            pixels, labels = digits.sample_grids(np.random.default_rng([self.seed, 2]), 256, "held_out")
            logits = self.average_head(self.family.features(self.average, pixels))
            expected = torch.from_numpy(labels)
            result["patch"] = float((logits.argmax(-1) == expected[:, patch_cells()]).float().mean())
            cells = torch.zeros(len(labels), digits.CELLS, 10).index_add_(1, patch_cells(), logits)
            result["cell"] = float((cells.argmax(-1) == expected).float().mean())
            return result
        for images in (1, 4, 16):
            maker = BatchMaker(self.family, self.tokenizer, "held_out", [self.seed, 3, images])
            for task in (*digits.TASKS, "list"):
                batch = maker.draw(images, 96 // images if images < 16 else 16, [task], False, True)
                logits, expected = answer_logits(self.family, self.average, batch)
                right = logits.argmax(-1) == expected
                whole = task not in ("read", "list")
                share = right.all(-1).float().mean() if whole else right.float().mean()
                result[f"{task}_{images}"] = round(float(share), 4)
        return result

    def note(self, **record: Any) -> None:
        """Add a line to the log and show it."""
        head = {"step": self.step, "minutes": round(self.elapsed / 60, 2), "phase": self.phase}
        record = {**head, **record}
        self.records.append(record)
        log.info(json.dumps(record))

    def export(self) -> None:
        """Write the averaged model in bfloat16, its processor and the log to the output folder."""
        self.out.mkdir(parents=True, exist_ok=True)
        model = copy.deepcopy(self.average).to(torch.bfloat16)
        tokenizer = self.tokenizer
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=16,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model.save_pretrained(self.out)
        self.family.save_processor(tokenizer, self.out)
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        (self.out / "training_log.jsonl").write_text(lines)

    def save(self) -> None:
        """Save the run, if it has a state file."""
        if self.state_path is None:
            return
        state = {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "average": self.average.state_dict(),
            "average_head": self.average_head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "records": self.records,
            "place": [self.elapsed, self.step, self.phase_step, self.phase, self.stage],
        }
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.state_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.state_path)

    def _resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.elapsed, self.step, self.phase_step, self.phase, self.stage = state["place"]
        for name in ("model", "head", "average", "average_head"):
            getattr(self, name).load_state_dict(state[name])
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self.records = state["records"]

    def train(self, save_every: float = 180.0) -> None:
        """Train until the time is used up, saving and logging every ``save_every`` seconds."""
        clock = time.monotonic()
        saved = self.elapsed
        losses: list[float] = []
        rights: list[float] = []
        running = 0.0
        while self.elapsed < self.total:
            if self.phase == "vision" and self.progress >= 1.0:
                self.note(end_of="vision", **self.check())
                self._start_decoder()
            if self.phase == "vision":
                loss, right = self._vision_step()
            else:
                loss, right, images = self._decoder_step()
                if images == max(CURRICULUM[self.stage].images):
                    running += 0.03 * (right - running)
                stage = CURRICULUM[self.stage]
                if self.stage + 1 < len(CURRICULUM) and (running >= stage.advance_at or self.progress >= stage.until):
                    self.note(end_of=f"stage {self.stage}", running=round(running, 4))
                    self.stage += 1
                    running = 0.0
            losses.append(loss)
            rights.append(right)
            now = time.monotonic()
            self.elapsed += now - clock
            clock = now
            if self.step % 50 == 0:
                self.note(
                    stage=self.stage,
                    loss=round(float(np.mean(losses)), 4),
                    right=round(float(np.mean(rights)), 4),
                    running=round(running, 4),
                    lr=round(self._learning_rate(), 6),
                )
                losses, rights = [], []
            if self.elapsed - saved >= save_every:
                saved = self.elapsed
                self.note(held_out=self.check())
                self.export()
                self.save()
        self.note(held_out=self.check())
        self.export()
        self.save()
