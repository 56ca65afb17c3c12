"""`attnpack export` and `attnpack run`, once their arguments are checked."""

import argparse
import logging
import sys
import time
import warnings
from types import SimpleNamespace
from typing import Any

from attnpack_cli.arguments import ranks_of
from attnpack_cli.errors import UserError
from attnpack_fx import export as exporters
from attnpack_fx.demo.load import Loaded, load, model_inputs, open_images
from attnpack_fx.demo.printed import Printed
from attnpack_fx.demo.steps import Steps
from attnpack_fx.export.artefact import PROCESSOR
from attnpack_fx.export.model import any_count
from attnpack_fx.export.runtime import PackedGenerator
from attnpack_fx.export.signature import DTYPES
from attnpack_fx.passes.quantize import Quantize
from attnpack_fx.policy import PackPolicy, PolicyError

#: How often a target reports what comes next, but for what it reports of each step.
_REPORTS = {"onnx": (1, 2), "tensorrt": (2, 2), "aoti": (1, 1)}


def export(arguments: argparse.Namespace) -> None:
    # What PyTorch's exporters have to say about themselves.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    policy = _policy(arguments)
    with Steps(1) as steps:
        steps.begin("loading the model")
        loaded = load(arguments.model, arguments.dtype or "float32", ranks_of(arguments))
        example = _example(loaded, arguments.image) if loaded.vision else None
        steps.expect(_reports(arguments.to, policy, loaded.vision))
        try:
            folder = getattr(exporters, f"export_{arguments.to}")(
                loaded.model,
                policy,
                arguments.out,
                example=example,
                processor=loaded.processor,
                dims=dict(arguments.dim),
                progress=steps.begin,
            )
        except (NotImplementedError, ValueError, ImportError, FileExistsError) as error:
            raise UserError(str(error)) from error
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {arguments.to}, {size / 1e6:.1f} MB. attnpack run {folder} --prompt TEXT")


def run(arguments: argparse.Namespace) -> None:
    images = open_images(arguments.image)
    chosen = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "seed")}
    try:
        generator = PackedGenerator(arguments.artefact, threads=arguments.threads)
        loaded = _loaded(generator)
        inputs = model_inputs(loaded, arguments.prompt, images)
        printed = Printed(loaded.tokenizer)
        began = time.perf_counter()
        generator.generate(
            **inputs,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=arguments.sample,
            **{name: value for name, value in chosen.items() if value is not None},
            on_token=printed,
        )
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    seconds = time.perf_counter() - began
    assert generator.state is not None
    print(flush=True)
    print(
        f"{len(printed.tokens)} tokens in {seconds:.2f} s after a prompt of {inputs['input_ids'].shape[1]}; "
        f"cache {generator.state.bytes / 1e6:.2f} MB",
        file=sys.stderr,
    )


def _reports(target: str, policy: PackPolicy, vision: bool) -> int:
    """How often the exporter of `target` says what comes next: of prefill, decode, maybe vision and angles of folds."""
    each, once = _REPORTS[target]
    return each * (2 + vision + (policy.fold_every is not None)) + once


def _policy(arguments: argparse.Namespace) -> PackPolicy:
    try:
        if arguments.policy is not None:
            return PackPolicy.load(arguments.policy)
        passes = (Quantize(bits=arguments.bits),) if arguments.bits else ()
        return PackPolicy(**ranks_of(arguments), passes=passes)
    except (PolicyError, OSError) as error:
        raise UserError(str(error)) from error


def _example(loaded: Loaded, file: str | None) -> dict[str, Any] | None:
    """Inputs with an image, by which the vision tower is exported, where it takes images of more than one size."""
    if file is None:
        if any_count(loaded.model):
            return None
        raise UserError("this model's vision tower is exported for images of one size: give one, --image FILE")
    return model_inputs(loaded, "", open_images([file]))


def _loaded(generator: Any) -> Loaded:
    """The artefact's processor, and what prompts are made for."""
    from transformers import AutoProcessor, AutoTokenizer

    place, facts = generator.folder / PROCESSOR, generator.manifest.model
    vision = bool(facts["image_tokens"])
    try:
        processor = (AutoProcessor if vision else AutoTokenizer).from_pretrained(place)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load the processor in {place}: {error}") from error
    model = SimpleNamespace(dtype=DTYPES[facts["dtype"]], device="cpu")
    return Loaded(str(generator.folder), model, processor, vision)
