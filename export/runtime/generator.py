"""`PackedGenerator`: prompts to tokens with an artefact of any target."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnpack_fx.export import manifest as manifests
from attnpack_fx.export.layout import Layout
from attnpack_fx.export.manifest import Manifest
from attnpack_fx.export.policies import layout_of
from attnpack_fx.export.runtime import state as states
from attnpack_fx.export.runtime import text_alone
from attnpack_fx.export.runtime.loading import load
from attnpack_fx.export.runtime.planning import Plan, plan
from attnpack_fx.export.runtime.prompting import Images, Prompt, Prompting, as_tensor
from attnpack_fx.export.runtime.sampling import Sampling, most_likely
from attnpack_fx.export.runtime.session import Held, Session
from attnpack_fx.export.runtime.state import CacheState
from attnpack_fx.export.signature import DTYPES, ArtefactError


class PackedGenerator:
    """Generates from a packed cache with an artefact that `export_onnx`, `export_tensorrt` or `export_aoti` wrote.

    artefact: its folder. threads: for ONNX Runtime, how many a step may use; None: as many as it likes. providers: of
    ONNX Runtime, instead of its CPU. Other targets take neither.

    Raises `ArtefactError` for a folder that is not as it was written or that this library does not know, before
    anything is run, and `ImportError` where the target's runtime is missing.
    """

    def __init__(
        self,
        artefact: str | os.PathLike[str],
        *,
        threads: int | None = None,
        providers: Sequence[Any] | None = None,
    ) -> None:
        self.folder = Path(artefact)
        self.manifest: Manifest = manifests.read(self.folder)
        facts = self.manifest.model
        try:
            self.layout: Layout = layout_of(
                self.manifest.policy,
                layers=facts["layers"],
                kv_heads=facts["kv_heads"],
                head_dim=facts["head_dim"],
                axes=facts["axes"],
                dtype=DTYPES[facts["dtype"]],
                vision=bool(facts["image_tokens"]),
            )
            self._ends, self._pad = list(facts["eos"]), facts["pad"]
        except (KeyError, TypeError, ValueError, NotImplementedError) as error:
            raise ArtefactError(f"{self.folder}: its manifest contradicts itself ({error!r}); export again") from error
        self.sessions: dict[str, Session] = load(self.folder, self.manifest, threads, providers)
        self._prompting = Prompting(self.manifest, self.layout, self.sessions.get("vision"))
        #: Of the last call of `generate`; None before.
        self.state: CacheState | None = None

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        on_token: Callable[[Tensor], None] | None = None,
        **images: Any,
    ) -> Tensor:
        """Tokens int64 `[B, T + new]`, the prompt's first, as `model.generate` returns them.

        input_ids, attention_mask, images: the prompt, as `prefill` takes it.
        do_sample, temperature, top_k, top_p, seed: as in `Sampling`; greedy without do_sample. eos_token_id: instead of
        the model's, `()` for none; a sample that is through goes on with the pad token. on_token: called with the new
        tokens `[B]` of every step.

        Raises `ArtefactError` for tensors that do not fit the artefact, and ValueError for options that make no sense.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, expected at least 1")
        sampling = Sampling(temperature, top_k, top_p) if do_sample else None
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        ends = self._ends if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        input_ids = as_tensor("input_ids", input_ids)
        logits, self.state = self._begun(self._prompt(input_ids, attention_mask, **images))
        state = self.state
        decode = self.sessions["decode"]
        held = decode.hold(state.packed)
        tokens, done = [input_ids.cpu().long()], torch.zeros(len(input_ids), dtype=torch.bool)
        for number in range(max_new_tokens):
            new = self._next(logits, number, sampling, generator)
            if self._pad is not None:
                new = new.masked_fill(done, self._pad)
            tokens.append(new[:, None])
            if on_token is not None:
                on_token(new)
            if ends:
                done = done | torch.isin(new, torch.tensor(list(ends)))
            if number == max_new_tokens - 1 or bool(done.all()):
                break
            if count := states.due(state, self.manifest.policy):
                states.fold(state, self.layout, count, self._angles if "angles" in self.sessions else None)
                held = decode.hold(state.packed)
            new = new[:, None]
            logits = self._decode(state, new, torch.ones_like(new), torch.full_like(new, number), held)
        return torch.cat(tokens, 1)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_features: Tensor | Sequence[Tensor] | None = None,
        position_ids: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, CacheState]:
        """Logits `[B, 1, V]` behind a prompt, and its packed cache.

        For hosts with a loop of their own: `CacheState.packed` is what the decode step takes besides tokens and past.

        All tensors may be PyTorch's or NumPy's.

        input_ids, attention_mask: int64 `[B, T]`, padding on the left, 0 in the mask. pixel_values, image_grid_thw,
        image_sizes: as the processor makes them; image_features: instead of pixels, `[F, hidden]`, or those of
        DeepStack behind them, as `attnpack_fx.export.features` makes them. position_ids: int64 `[B, T]`, or
        `[3, B, T]` under M-RoPE, where they do not follow from the prompt and its images (videos). Other inputs that
        processors make (`token_type_ids`, `mm_token_type_ids`) are not needed.
        """
        given: dict[str, Any] = {
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "image_sizes": image_sizes,
            "image_features": image_features,
            "position_ids": position_ids,
        }
        prompt = self._prompt(input_ids, attention_mask, **given, **unused)
        logits, self.state = self._packed(prompt, self._planned(prompt))
        return logits, self.state

    def _prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        pixel_values: Tensor | None = None,
        image_features: Tensor | Sequence[Tensor] | None = None,
        position_ids: Tensor | None = None,
        **cut: Any,
    ) -> Prompt:
        _refuse(cut)

        def given(name: str, value: Any) -> Tensor | None:
            return None if value is None else as_tensor(name, value)

        features = (
            image_features if isinstance(image_features, list | tuple) else given("image_features", image_features)
        )
        images = Images(
            given("pixel_values", pixel_values), features, {name: given(name, value) for name, value in cut.items()}
        )
        ids, mask = as_tensor("input_ids", input_ids), given("attention_mask", attention_mask)
        return self._prompting.prompt(ids, mask, images, given("position_ids", position_ids))

    def _planned(self, prompt: Prompt) -> Plan:
        return plan(self.manifest.policy, self.layout, prompt.image, prompt.mask > 0)

    def _begun(self, prompt: Prompt) -> tuple[Tensor, CacheState]:
        """What `prefill` returns, by decode steps where these do: what the prompt left is then in the window."""
        planned = self._planned(prompt)
        piece = text_alone.piece(self.manifest, prompt, planned)
        if not piece:
            return self._packed(prompt, planned)
        state = text_alone.empty(self.layout, prompt, planned)
        held = self.sessions["decode"].hold(state.packed)
        places = text_alone.places(prompt)
        pieces = (each.split(piece, 1) for each in (prompt.ids, prompt.mask, places))
        for ids, mask, place in zip(*pieces, strict=True):
            logits = self._decode(state, ids, mask, place, held)
        return logits[:, -1:], state

    def _packed(self, prompt: Prompt, planned: Plan) -> tuple[Tensor, CacheState]:
        positions = prompt.positions
        indices = {f"{name}_index": index for name, index in planned.index.items()}
        rows = {"input_ids": prompt.ids, "attention_mask": prompt.mask, "position_ids": positions}
        made = self.sessions["prefill"].run({**rows, **prompt.features, **indices})
        logits = made.pop("logits")
        packed = made | planned.masks() | planned.positions(positions, self.layout.turns)
        packed["position_offset"] = prompt.offset
        dense = planned.positions(positions, ["prompt"])["prompt_position_ids"]
        return logits, CacheState.empty(self.layout, packed, dense)

    def _next(
        self, logits: Tensor, number: int, sampling: Sampling | None, generator: torch.Generator | None
    ) -> Tensor:
        """The token `[B]` after the last of `logits`."""
        scores = logits[:, -1].float().cpu()
        if not bool(scores.isfinite().all()):
            raise ArtefactError(
                f"generate: the logits of token {number} hold NaN or Inf, so no token after it means anything; in "
                "float16 that is often an overflow: export in float32"
            )
        return most_likely(scores) if sampling is None else sampling.draw(scores, generator)

    def _decode(self, state: CacheState, new: Tensor, mask: Tensor, places: Tensor, held: Held) -> Tensor:
        """Logits behind new tokens `[B, n]`, which of them there are, and where they stand; the state has grown by
        them.
        """
        mask = torch.cat([state.mask, mask], 1)
        given = {"input_ids": new, "attention_mask": mask, "position_ids": places, **state.window}
        made = self.sessions["decode"].run(given, held)
        logits = made.pop("logits")
        state.grow(made, mask, torch.cat([state.positions, places], 1))
        return logits

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        made = self.sessions["angles"].run({"position_ids": positions.contiguous()})
        return made["cos"], made["sin"]


def _refuse(unused: Mapping[str, Any]) -> None:
    """What processors make besides is ignored; anything else is a mistake."""
    known = {"image_grid_thw", "image_sizes", "token_type_ids", "mm_token_type_ids", "batch_num_images"}
    if wrong := sorted(unused.keys() - known):
        raise TypeError(f"generate: got an unexpected option {wrong[0]!r}")
