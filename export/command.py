"""`attnpack export` and `attnpack run`."""

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from attnpack_fx.arguments import add_prompt, add_ranks, policy_of, positive, ranks_of, settle
from attnpack_fx.demo.errors import UserError, require

if TYPE_CHECKING:
    from torch import Tensor

    from attnpack_fx.demo.load import Loaded
    from attnpack_fx.policy import PackPolicy

_TARGETS = ("onnx", "tensorrt", "aoti")


def add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a model and its packed cache for another runtime",
        description="Write a transformers model, its decode step over a packed cache and the prefill that packs it: an "
        "artefact that `attnpack run` and attnpack_fx.export.PackedGenerator load.",
    )
    parser.add_argument("model", metavar="ID_OR_PATH")
    parser.add_argument("--to", required=True, choices=_TARGETS, help="the runtime")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="what to write")
    parser.add_argument("--policy", type=Path, metavar="FILE.json", help="what PackPolicy.save wrote")
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), help="of coefficients and bases (as the weights)")
    add_ranks(parser)
    parser.add_argument(
        "--image", metavar="FILE", help="a picture of the size to export the vision tower for, where it takes one size"
    )
    parser.add_argument(
        "--dim",
        action="append",
        default=[],
        type=_dim,
        metavar="NAME=LEAST:MOST",
        help="the sizes that a dimension may have, e.g. batch_size=1:8; may be repeated",
    )
    parser.set_defaults(run=_export)


def add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="generate with an artefact",
        description="Answer a prompt with an artefact of `attnpack export`; the text is printed as it comes.",
    )
    parser.add_argument("artefact", metavar="FOLDER")
    add_prompt(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="length of the answer (64)")
    parser.add_argument("--threads", type=positive, metavar="N", help="of ONNX Runtime (as many as it likes)")
    sampling = parser.add_argument_group("sampling", "greedy without --sample")
    sampling.add_argument("--sample", action="store_true", help="draw tokens by their probability")
    sampling.add_argument("--temperature", type=float, default=1.0, metavar="T")
    sampling.add_argument("--top-k", type=positive, metavar="K")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same tokens every time")
    parser.set_defaults(run=_run)


def _export(arguments: argparse.Namespace) -> None:
    require("transformers", "PIL", "tqdm")
    settle()
    # What PyTorch's exporters have to say about themselves.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from tqdm import tqdm

    from attnpack_fx import export
    from attnpack_fx.demo.load import load

    write = getattr(export, f"export_{arguments.to}")
    policy = _policy(arguments)
    loaded = load(arguments.model, arguments.dtype or "float32")
    example = _example(loaded, arguments.image) if loaded.vision else None
    with tqdm(unit="step", leave=False, file=sys.stderr) as progress:

        def told(text: str) -> None:
            progress.set_description(text)
            progress.update()

        try:
            folder = write(
                loaded.model,
                policy,
                arguments.out,
                example=example,
                processor=loaded.processor,
                dims=dict(arguments.dim),
                progress=told,
            )
        except (NotImplementedError, ValueError, ImportError, FileExistsError) as error:
            raise UserError(str(error)) from error
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {arguments.to}, {size / 1e6:.1f} MB. attnpack run {folder} --prompt TEXT")


def _run(arguments: argparse.Namespace) -> None:
    require("transformers", "PIL")
    settle()
    if arguments.prompt is None:
        raise UserError("needs a question: --prompt TEXT")
    from attnpack_fx.demo.load import model_inputs, open_images
    from attnpack_fx.export.runtime import PackedGenerator

    images = open_images(arguments.image)
    try:
        generator = PackedGenerator(arguments.artefact, threads=arguments.threads)
        loaded = _loaded(generator)
        inputs = model_inputs(loaded, arguments.prompt, images)
        printed = _Printed(loaded.tokenizer)
        began = time.perf_counter()
        generator.generate(
            **inputs,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=arguments.sample,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            on_token=printed,
        )
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    seconds = time.perf_counter() - began
    assert generator.state is not None
    print(
        f"\n{len(printed.tokens)} tokens in {seconds:.2f} s after a prompt of {inputs['input_ids'].shape[1]}; "
        f"cache {generator.state.bytes / 1e6:.2f} MB",
        file=sys.stderr,
    )


def _policy(arguments: argparse.Namespace) -> "PackPolicy":
    from attnpack_fx.passes.quantize import Quantize
    from attnpack_fx.policy import PackPolicy, PolicyError

    try:
        if arguments.policy is not None:
            if ranks_of(arguments) or arguments.bits:
                raise UserError("--policy has ranks and bits of its own: leave --vision-rank, --text-rank, --bits out")
            return PackPolicy.load(arguments.policy)
        return policy_of(arguments, passes=(Quantize(bits=arguments.bits),) if arguments.bits else ())
    except (PolicyError, OSError) as error:
        raise UserError(str(error)) from error


def _example(loaded: "Loaded", file: str | None) -> dict[str, Any] | None:
    """Inputs with an image, by which the vision tower is exported, where it takes images of more than one size."""
    from attnpack_fx.demo.load import model_inputs, open_images
    from attnpack_fx.export.model import any_count

    if file is None:
        if any_count(loaded.model):
            return None
        raise UserError("this model's vision tower is exported for images of one size: give one, --image FILE")
    return model_inputs(loaded, "", open_images([file]))


def _loaded(generator: Any) -> "Loaded":
    """The artefact's processor, and what prompts are made for."""
    from transformers import AutoProcessor, AutoTokenizer

    from attnpack_fx.demo.load import Loaded
    from attnpack_fx.export.artefact import PROCESSOR
    from attnpack_fx.export.signature import DTYPES

    place, facts = generator.folder / PROCESSOR, generator.manifest.model
    if not place.is_dir():
        raise UserError(f"{generator.folder}: holds no processor; export again with one, or use PackedGenerator")
    vision = bool(facts["image_tokens"])
    try:
        processor = (AutoProcessor if vision else AutoTokenizer).from_pretrained(place)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load the processor in {place}: {error}") from error
    model = SimpleNamespace(dtype=DTYPES[facts["dtype"]], device="cpu")
    return Loaded(str(generator.folder), model, processor, vision)


class _Printed:
    """Prints text as tokens come: what they add to the text of those before."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokens: list[int] = []
        self._tokenizer, self._text = tokenizer, ""

    def __call__(self, new: "Tensor") -> None:
        self.tokens.append(int(new[0]))
        text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        # A character may take several tokens: until they are there, it decodes to a replacement character.
        if not text.endswith("\ufffd"):
            print(text[len(self._text) :], end="", flush=True)
            self._text = text


def _dim(text: str) -> tuple[str, tuple[int, int]]:
    name, _, bounds = text.partition("=")
    least, _, most = bounds.partition(":")
    if not name or not least.isdecimal() or not most.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=LEAST:MOST, e.g. batch_size=1:8")
    return name, (int(least), int(most))
