"""Train the small vision-language model of ``benchmarks/assets/digits-llava``.

    python benchmarks/assets/make_digits_llava.py --out benchmarks/assets/digits-llava --minutes 60 --seed 0

The model is a `LlavaForConditionalGeneration` with a CLIP vision tower and a Llama decoder; the data are the
training split of `attnpack_fx.demo.digits`.  Training has two phases.  First the vision tower and the
projector learn to name, from every patch, the digit the patch belongs to.  Then the tower is frozen and the
decoder and the projector learn the four tasks, with a curriculum over the number of images in a prompt; a
context holds several questions, and the loss is taken on the answers only.  In most contexts each question
sees the images but no other question, and has the positions it would have alone; in the others the questions
follow each other as turns.  Half of the prompts of less than 16 images are cut out of a prompt of 16: images
are left out, but names and positions stay those of the full prompt.  The weights that are saved are an
exponential average.

The schedule is a share of ``--minutes`` of training time, so that a slower computer gets fewer steps.  With
``--state`` the run is saved regularly and resumed from there.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from attnpack_fx.demo import digits

logger = logging.getLogger("make_digits_llava")

PATCH = 8
TOKENS_PER_IMAGE = (digits.IMAGE_SIZE // PATCH) ** 2
NAME_TOKENS = 3
PIXEL_MEAN = 0.2
PIXEL_STD = 0.3
CHAT_TEMPLATE = (
    "{% set ns = namespace(image=0) %}{% set parts = namespace(text='') %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}"
    "{% set parts.text = parts.text ~ 'question : ' ~ message['content'] ~ ' answer : ' %}"
    "{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{% set ns.image = ns.image + 1 %}"
    "{% set parts.text = parts.text ~ 'image #' ~ ns.image ~ ' : <image> ' %}{% endif %}{% endfor %}"
    "{% for item in message['content'] %}{% if item['type'] == 'text' %}"
    "{% set parts.text = parts.text ~ 'question : ' ~ item['text'] ~ ' answer : ' %}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% else %}"
    "{% if message['content'] is string %}{% set parts.text = parts.text ~ message['content'] %}"
    "{% else %}{% for item in message['content'] %}{% if item['type'] == 'text' %}"
    "{% set parts.text = parts.text ~ item['text'] %}{% endif %}{% endfor %}{% endif %}"
    "{% set parts.text = parts.text ~ ' <eos> ' %}"
    "{% endif %}{% endfor %}{{ parts.text | trim }}"
)

TASK_SHARES = {"read": 0.30, "cell": 0.30, "count": 0.18, "locate": 0.22}
TASK_WEIGHTS = {"read": 1.0, "cell": 3.0, "count": 2.0, "locate": 2.0}


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    Attributes:
        images: numbers of images in a prompt and the share of batches that use each.
        until: the share of the decoder phase at which the stage ends at the latest.
        advance_at: the running share of right answer tokens that ends the stage early.
    """

    images: dict[int, float]
    until: float
    advance_at: float


CURRICULUM = (
    Stage({1: 1.0}, until=0.12, advance_at=0.85),
    Stage({1: 0.2, 2: 0.8}, until=0.22, advance_at=0.85),
    Stage({1: 0.1, 2: 0.2, 4: 0.7}, until=0.36, advance_at=0.85),
    Stage({1: 0.1, 2: 0.1, 4: 0.2, 8: 0.6}, until=0.50, advance_at=0.88),
    Stage({1: 0.15, 2: 0.1, 4: 0.2, 8: 0.15, 16: 0.4}, until=1.0, advance_at=2.0),
)
SEQUENCES = {1: 28, 2: 18, 4: 10, 8: 6, 16: 4}
QUESTIONS = {1: 8, 2: 10, 4: 16, 8: 24, 16: 32}
TURNS = {1: 2, 2: 2, 4: 4, 8: 8, 16: 16}
SPREAD_SHARE = 0.5
TURNS_SHARE = 0.3

VISION_SHARE = 0.13
VISION_BATCH = 64
LEARNING_RATES = {"vision": 2e-3, "decoder": 1e-3}
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 100
AVERAGE_DECAY = 0.998


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `digits.vocabulary`; every prompt starts with ``<bos>``."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>", digits.IMAGE_TOKEN]
    words = special + digits.vocabulary()
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": digits.IMAGE_TOKEN},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_processor() -> LlavaProcessor:
    """The processor: 64x64 images, centred and scaled, expanded to 64 image tokens each."""
    size = digits.IMAGE_SIZE
    image_processor = CLIPImageProcessor(
        size={"height": size, "width": size},
        crop_size={"height": size, "width": size},
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=digits.IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained model, in float32."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=digits.IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(digits.IMAGE_TOKEN),
        image_seq_length=TOKENS_PER_IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
    cell_codes = torch.randn(digits.CELLS, vision.hidden_size)
    place_codes = torch.randn(TOKENS_PER_IMAGE // digits.CELLS, vision.hidden_size)
    with torch.no_grad():
        table = model.model.vision_tower.embeddings.position_embedding.weight
        table[1:] = 0.3 * (cell_codes[patch_cells()] + place_codes[patch_places()])
    return model


def pixel_values(pixels: NDArray[np.uint8]) -> Tensor:
    """Grey images ``[n, 64, 64]`` as the processor would give them: ``[n, 3, 64, 64]``."""
    grey = torch.from_numpy(pixels).float().div_(255.0).sub_(PIXEL_MEAN).div_(PIXEL_STD)
    return grey[:, None].expand(-1, 3, -1, -1)


@dataclass
class Batch:
    """Contexts of equal length, each several images followed by several questions with their answers.

    Attributes:
        input_ids: ``[batch, length]``, images expanded to their placeholder tokens.
        positions: ``[batch, length]`` position of every token.
        pixels: ``[batch * images, 3, 64, 64]``.
        mask: ``[length, length]``, true where a token (row) sees another (column); None if it sees all of its
            predecessors.
        asked: ``[answers]`` indices of the tokens followed by a token of an answer; the same in each row.
        weights: ``[answers]`` loss weights.
        tasks: the task of each of ``asked``.
    """

    input_ids: Tensor
    positions: Tensor
    pixels: Tensor
    mask: Tensor | None
    asked: Tensor
    weights: Tensor
    tasks: list[str]


class BatchMaker:
    """Draws training or evaluation batches.

    Args:
        tokenizer: the tokenizer of the model.
        split: where the digit samples come from.
        seed: of the random generator.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, split: digits.Split, seed: list[int]) -> None:
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self.bos = self.ids["<bos>"]
        self.eos = self.ids["<eos>"]
        self.split = split
        self.rng = np.random.default_rng(seed)

    def _encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def draw(self, images: int, sequences: int, tasks: list[str], spread: bool, turns: bool) -> Batch:
        """Draw a batch.

        Args:
            images: images in each context.
            sequences: contexts in the batch.
            tasks: the questions of every context, in order.
            turns: the questions follow each other as turns of a conversation, each about another image if
                there are enough of them; otherwise each sees the images only, as if it stood alone.
            spread: give the images names and positions picked from a prompt of 16 images.

        Returns:
            The batch, on the CPU.
        """
        block = NAME_TOKENS + TOKENS_PER_IMAGE
        pixels, labels = digits.sample_grids(self.rng, sequences * images, self.split)
        labels = labels.reshape(sequences, images, digits.CELLS)
        image_part = [self.ids[digits.IMAGE_TOKEN]] * TOKENS_PER_IMAGE
        rows: list[list[int]] = []
        positions: list[NDArray[np.int64]] = []
        asked: list[int] = []
        kinds: list[str] = []
        for index in range(sequences):
            places = np.arange(images)
            if spread:
                places = np.sort(self.rng.choice(digits.MAX_IMAGES, size=images, replace=False))
            names = [digits.image_name(int(place)) for place in places]
            row = [self.bos]
            starts = [np.zeros(1, dtype=np.int64)]
            for name, place in zip(names, places, strict=True):
                row += self._encode(f"image {name} :") + image_part
                starts.append(1 + place * block + np.arange(block))
            if turns and len(tasks) <= images:
                targets = self.rng.permutation(images)[: len(tasks)]
            else:
                targets = self.rng.integers(images, size=len(tasks))
            end = 1 + (digits.MAX_IMAGES if spread else images) * block
            segments = [0] * len(row)
            for number, (task, target) in enumerate(zip(tasks, targets, strict=True)):
                text, answer = digits.ask(task, labels[index], int(target), names[int(target)], self.rng)
                query = self._encode(text)
                reply = [*self._encode(answer), self.eos]
                row += query + reply
                if index == 0:
                    asked += range(len(row) - len(reply) - 1, len(row) - 1)
                    kinds += [task] * len(reply)
                starts.append(end + np.arange(len(query) + len(reply)))
                segments += [number + 1] * (len(query) + len(reply))
                if turns:
                    end += len(query) + len(reply)
            rows.append(row)
            positions.append(np.concatenate(starts))
        mask = None
        if not turns:
            part = torch.tensor(segments)
            mask = ((part == 0)[None, :] | (part[None, :] == part[:, None])).tril()
        return Batch(
            input_ids=torch.tensor(rows),
            positions=torch.from_numpy(np.stack(positions)),
            pixels=pixel_values(pixels),
            mask=mask,
            asked=torch.tensor(asked),
            weights=torch.tensor([TASK_WEIGHTS[kind] for kind in kinds]),
            tasks=kinds,
        )

    def draw_stage(self, stage: Stage) -> tuple[int, Batch]:
        """Draw a training batch of a curriculum stage; also returns its number of images."""
        choices = list(stage.images)
        images = int(self.rng.choice(choices, p=[stage.images[choice] for choice in choices]))
        turns = bool(self.rng.random() < TURNS_SHARE)
        count = (TURNS if turns else QUESTIONS)[images]
        shares = [TASK_SHARES[task] for task in digits.TASKS]
        tasks = [str(task) for task in self.rng.choice(digits.TASKS, size=count, p=shares)]
        spread = images < digits.MAX_IMAGES and bool(self.rng.random() < SPREAD_SHARE)
        return images, self.draw(images, SEQUENCES[images], tasks, spread, turns)


def answer_logits(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[batch, answers, vocabulary]`` in float32 and the expected tokens ``[batch, answers]``."""
    if batch.mask is None:
        mask = torch.ones_like(batch.input_ids[:, :-1])
    else:
        mask = batch.mask[None, None, :-1, :-1]
    hidden = model.model(
        input_ids=batch.input_ids[:, :-1],
        pixel_values=batch.pixels,
        attention_mask=mask,
        position_ids=batch.positions[:, :-1],
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[:, batch.asked]).float(), batch.input_ids[:, batch.asked + 1]


def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Projected image features ``[n, 64, hidden]``."""
    return torch.stack(list(model.model.get_image_features(pixels, return_dict=True).pooler_output))


def patch_cells() -> Tensor:
    """The cell ``[64]`` that every patch lies in."""
    side = digits.IMAGE_SIZE // PATCH
    patch = torch.arange(TOKENS_PER_IMAGE)
    row = (patch // side) * PATCH // digits.CELL_HEIGHT
    column = (patch % side) * PATCH // digits.CELL_WIDTH
    return row * digits.COLUMNS + column


def patch_places() -> Tensor:
    """Which part ``[64]`` of its cell every patch shows, counted row by row."""
    side = digits.IMAGE_SIZE // PATCH
    high, wide = digits.CELL_HEIGHT // PATCH, digits.CELL_WIDTH // PATCH
    patch = torch.arange(TOKENS_PER_IMAGE)
    return (patch // side) % high * wide + patch % side % wide


class Run:
    """The state of a training run.

    Args:
        out: folder of the finished model.
        minutes: training time.
        seed: of the weights and the data.
        state_path: file to save to and resume from, if any.
    """

    def __init__(self, out: Path, minutes: float, seed: int, state_path: Path | None) -> None:
        self.out = out
        self.total = minutes * 60.0
        self.state_path = state_path
        torch.manual_seed(seed)
        self.processor = make_processor()
        self.model = make_model(self.processor.tokenizer)
        self.head = nn.Linear(self.model.config.text_config.hidden_size, 10)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.average_head = copy.deepcopy(self.head).requires_grad_(False)
        self.seed = seed
        self.elapsed = 0.0
        self.step = 0
        self.phase_step = 0
        self.phase = "vision"
        self.stage = 0
        self.optimizer = self._optimizer()
        self.records: list[dict[str, Any]] = []
        if state_path is not None and state_path.exists():
            self._resume(state_path)
        self.batches = BatchMaker(self.processor.tokenizer, "train", [seed, 1, self.step])

    def _trained(self) -> Iterator[nn.Module]:
        yield self.model.model.multi_modal_projector
        if self.phase == "vision":
            yield self.model.model.vision_tower
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
            return min(1.0, self.elapsed / (VISION_SHARE * self.total))
        return min(1.0, (self.elapsed / self.total - VISION_SHARE) / (1.0 - VISION_SHARE))

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
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.head(patch_features(self.model, pixel_values(pixels)))
        logits = logits.float().reshape(-1, 10)
        loss = functional.cross_entropy(logits, expected, label_smoothing=0.05)
        self._update(loss)
        right = (logits.detach().argmax(-1) == expected).float().mean()
        return float(loss.detach()), float(right)

    def _decoder_step(self) -> tuple[float, float, int]:
        images, batch = self.batches.draw_stage(CURRICULUM[self.stage])
        with torch.autocast("cpu", torch.bfloat16):
            logits, expected = answer_logits(self.model, batch)
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
            scale = 0.3 / patch_features(self.model, pixel_values(pixels)).square().mean().sqrt()
            self.model.model.multi_modal_projector.linear_2.weight.mul_(scale)
            self.model.model.multi_modal_projector.linear_2.bias.mul_(scale)
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
            logits = self.average_head(patch_features(self.average, pixel_values(pixels)))
            expected = torch.from_numpy(labels)
            result["patch"] = float((logits.argmax(-1) == expected[:, patch_cells()]).float().mean())
            cells = torch.zeros(len(labels), digits.CELLS, 10).index_add_(1, patch_cells(), logits)
            result["cell"] = float((cells.argmax(-1) == expected).float().mean())
            return result
        for images in (1, 4, 16):
            maker = BatchMaker(self.processor.tokenizer, "held_out", [self.seed, 3, images])
            for task in digits.TASKS:
                batch = maker.draw(images, 96 // images if images < 16 else 16, [task], False, True)
                with torch.autocast("cpu", torch.bfloat16):
                    logits, expected = answer_logits(self.average, batch)
                right = logits.argmax(-1) == expected
                share = right[:, :-1].float().mean() if task == "read" else right.all(-1).float().mean()
                result[f"{task}_{images}"] = round(float(share), 4)
        return result

    def note(self, **record: Any) -> None:
        """Add a line to the log and show it."""
        head = {"step": self.step, "minutes": round(self.elapsed / 60, 2), "phase": self.phase}
        record = {**head, **record}
        self.records.append(record)
        logger.info(json.dumps(record))

    def export(self) -> None:
        """Write the averaged model in bfloat16, its processor and the log to the output folder."""
        self.out.mkdir(parents=True, exist_ok=True)
        model = copy.deepcopy(self.average).to(torch.bfloat16)
        tokenizer = self.processor.tokenizer
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=16,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model.save_pretrained(self.out)
        self.processor.save_pretrained(self.out)
        self.processor.image_processor.save_pretrained(self.out)
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


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the digits vision-language model.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "digits-llava")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, default=None, help="file to save the run to and resume it from")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(arguments.threads)
    Run(arguments.out, arguments.minutes, arguments.seed, arguments.state).train()


if __name__ == "__main__":
    main()
