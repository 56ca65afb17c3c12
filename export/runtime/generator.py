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
from attnpack_fx.export.runtime.loading import load
from attnpack_fx.export.runtime.planning import Plan, mrope_positions, plan
from attnpack_fx.export.runtime.sampling import Sampling, most_likely
from attnpack_fx.export.runtime.session import Session
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
            self._image_tokens = torch.tensor(facts["image_tokens"], dtype=torch.int64)
            self._ends, self._pad = list(facts["eos"]), facts["pad"]
        except (KeyError, TypeError, NotImplementedError) as error:
            raise ArtefactError(f"{self.folder}: its manifest contradicts itself ({error!r}); export again") from error
        self.sessions: dict[str, Session] = load(self.folder, self.manifest, threads, providers)
        #: Of the last call of `generate`; None before.
        self.state: CacheState | None = None

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_features: Tensor | Sequence[Tensor] | None = None,
        position_ids: Tensor | None = None,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        on_token: Callable[[Tensor], None] | None = None,
        **unused: Any,
    ) -> Tensor:
        """Tokens int64 `[B, T + new]`, the prompt's first, as `model.generate` returns them.

        input_ids, attention_mask: int64 `[B, T]`, padding on the left, 0 in the mask. pixel_values, image_grid_thw,
        image_sizes: as the processor makes them; image_features: instead of pixels, `[F, hidden]`, or those of
        DeepStack behind them, as `attnpack_fx.export.features` makes them. position_ids: int64 `[B, T]`, or
        `[3, B, T]` under M-RoPE, where they do not follow from the prompt and its images (videos).
        do_sample, temperature, top_k, top_p, seed: as in `Sampling`; greedy without do_sample. eos_token_id: instead of
        the model's, `()` for none; a sample that is through goes on with the pad token. on_token: called with the new
        tokens `[B]` of every step. Other inputs that processors make (`token_type_ids`, `mm_token_type_ids`)
        are not needed.

        Raises `ArtefactError` for tensors that do not fit the artefact, and ValueError for options that make no sense.
        """
        _refuse(unused)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, expected at least 1")
        sampling = Sampling(temperature, top_k, top_p) if do_sample else None
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        ends = self._ends if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        ids = input_ids.cpu().long()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu().long()
        if ids.dim() != 2 or mask.shape != ids.shape or ids.shape[1] < 1:
            raise ArtefactError(
                f"generate: got input_ids {list(ids.shape)} and attention_mask {list(mask.shape)}, expected two [B, T]"
            )
        if bool((mask[:, -1] == 0).any()):
            raise ArtefactError("generate: attention_mask: got padding behind a prompt, expected it before (left)")
        cut = {**unused, "image_grid_thw": image_grid_thw, "image_sizes": image_sizes}
        features = self._features(ids, pixel_values, image_features, cut)
        positions = self._positions(ids, mask, image_grid_thw, position_ids)
        logits, planned = self._prefill(ids, mask, positions, features)
        prompt_positions = planned.positions(positions, ["prompt"])["prompt_position_ids"]
        assert self.state is not None
        decode = self.sessions["decode"]
        held = decode.hold(self.state.packed)
        tokens, done = [ids], torch.zeros(len(ids), dtype=torch.bool)
        for number in range(max_new_tokens):
            scores = logits[:, -1].float().cpu()
            new = most_likely(scores) if sampling is None else sampling.draw(scores, generator)
            if self._pad is not None:
                new = new.masked_fill(done, self._pad)
            tokens.append(new[:, None])
            if on_token is not None:
                on_token(new)
            if ends:
                done = done | torch.isin(new, torch.tensor(list(ends)))
            if number == max_new_tokens - 1 or bool(done.all()):
                break
            if count := states.due(self.state, self.manifest.policy):
                angles = self._angles if "angles" in self.sessions else None
                prompt_positions = states.fold(self.state, self.layout, count, prompt_positions, angles)
                held = decode.hold(self.state.packed)
            logits = self._decode(new[:, None], number, held)
        return torch.cat(tokens, 1)

    def _features(
        self,
        ids: Tensor,
        pixel_values: Tensor | None,
        given: Tensor | Sequence[Tensor] | None,
        cut: Mapping[str, Tensor | None],
    ) -> dict[str, Tensor]:
        """What prefill takes for image tokens; cut: grids and sizes of images, by name."""
        names = [spec.name for spec in self.manifest.steps["prefill"].inputs if "features" in spec.name]
        count = int(torch.isin(ids, self._image_tokens).sum())
        if not names:
            if pixel_values is not None or given is not None:
                raise ArtefactError("generate: got images, but this model takes text alone")
            return {}
        if given is not None:
            made = [given] if isinstance(given, Tensor) else list(given)
        elif pixel_values is not None:
            if "vision" not in self.sessions:
                raise ArtefactError(
                    "generate: pixel_values: this artefact has no vision step, as it was exported without an example "
                    "with images; give image_features, or export again with example=processor(...)"
                )
            self._check_images(cut)
            vision = self.sessions["vision"]
            dtype = vision.step.inputs[0].dtype
            made = list(vision.run({"pixel_values": pixel_values.to(dtype)}).values())
        else:
            facts = self.manifest.model
            made = [torch.zeros((0, facts["hidden"]), dtype=self.layout.dtype) for _ in names]
        if len(made) != len(names):
            raise ArtefactError(f"generate: image_features: got {len(made)} tensors, expected {len(names)}: {names}")
        if any(each.shape[0] != count for each in made):
            raise ArtefactError(
                f"generate: got {made[0].shape[0]} features of images for {count} image tokens in input_ids; give the "
                "pixels that belong to the prompt"
            )
        return dict(zip(names, made, strict=True))

    def _check_images(self, cut: Mapping[str, Tensor | None]) -> None:
        """Whether images are cut as those that the vision step was made with."""
        for name, expected in self.manifest.model.get("images", {}).items():
            found = cut.get(name)
            got = None if found is None else found.tolist()
            if got != expected:
                raise ArtefactError(
                    f"generate: {name}: got {got}, expected {expected}, for which the vision step was exported; give "
                    "image_features=attnpack_fx.export.features(model, inputs), or export again with such an example"
                )

    def _positions(self, ids: Tensor, mask: Tensor, grids: Tensor | None, given: Tensor | None) -> Tensor:
        if given is not None:
            return given.cpu().long()
        plain = (mask.cumsum(1) - 1).clamp(min=0)
        if self.layout.axes == 1:
            return plain
        image = torch.isin(ids, self._image_tokens) & (mask > 0)
        if not bool(image.any()):
            return plain[None].expand(self.layout.axes, -1, -1).contiguous()
        if grids is None:
            raise ArtefactError(
                "generate: this model's positions depend on the grid of every image: give image_grid_thw, or "
                "position_ids [3, B, T]"
            )
        return mrope_positions(ids, mask > 0, image, grids, int(self.manifest.model["merge"]))

    def _prefill(
        self, ids: Tensor, mask: Tensor, positions: Tensor, features: Mapping[str, Tensor]
    ) -> tuple[Tensor, Plan]:
        """Logits of the prompt's last tokens; the state is new."""
        real = mask > 0
        planned = plan(self.manifest.policy, self.layout, torch.isin(ids, self._image_tokens), real)
        indices = {f"{name}_index": index for name, index in planned.index.items()}
        rows = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        made = self.sessions["prefill"].run({**rows, **features, **indices})
        logits = made.pop("logits")
        highest = positions if positions.dim() == 2 else positions.amax(0)
        packed = made | planned.masks() | planned.positions(positions, self.layout.turns)
        packed["position_offset"] = highest.masked_fill(~real, 0).amax(1, keepdim=True) + 1
        self.state = CacheState.empty(self.layout, packed)
        return logits, planned

    def _decode(self, new: Tensor, number: int, held: Any) -> Tensor:
        state = self.state
        assert state is not None
        mask = torch.cat([state.mask, torch.ones_like(new)], 1)
        place = torch.full_like(new, number)
        given = {"input_ids": new, "attention_mask": mask, "position_ids": place, **state.window}
        made = self.sessions["decode"].run(given, held)
        logits = made.pop("logits")
        state.grow(made, mask, torch.cat([state.positions, place], 1))
        return logits

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        made = self.sessions["angles"].run({"position_ids": positions.contiguous()})
        return made["cos"], made["sin"]


def _refuse(unused: Mapping[str, Any]) -> None:
    """What processors make besides is ignored; anything else is a mistake."""
    known = {"token_type_ids", "mm_token_type_ids", "batch_num_images"}
    if wrong := sorted(unused.keys() - known):
        raise TypeError(f"generate: got an unexpected option {wrong[0]!r}")
