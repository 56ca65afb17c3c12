"""`attnpack demo` and `attnpack explain`, once their arguments are checked."""

import argparse
import json
from dataclasses import replace

from attnpack_cli.arguments import ranks_of
from attnpack_cli.errors import UserError
from attnpack_cli.models import trained_model
from attnpack_fx.demo import own, trained
from attnpack_fx.demo.generation import explained
from attnpack_fx.demo.load import load, model_inputs, open_images
from attnpack_fx.demo.steps import Steps
from attnpack_fx.policy import PackPolicy, PolicyError

_TEXT = "Explain in a few sentences how a key/value cache makes the generation of text faster."


def demo(arguments: argparse.Namespace) -> None:
    with Steps(1) as steps:
        try:
            (_trained if arguments.model is None else _own)(arguments, steps)
        except PolicyError as error:
            raise UserError(str(error)) from error


def explain(arguments: argparse.Namespace) -> None:
    images = open_images(arguments.image)
    ranks = ranks_of(arguments)
    with Steps(2) as steps:
        try:
            policy = PackPolicy(**ranks)
            steps.begin("loading the model")
            loaded = load(arguments.model, arguments.dtype or "float32", ranks)
            inputs = model_inputs(loaded, arguments.prompt or _TEXT, images)
            steps.begin("a few steps, dense and packed")
            report = explained(loaded, inputs, policy)
        except PolicyError as error:
            raise UserError(str(error)) from error
    print(json.dumps(report, indent=2) if arguments.json else report)


def _trained(arguments: argparse.Namespace, steps: Steps) -> None:
    settings = trained.QUICK if arguments.quick else trained.Settings()
    given = {name: value for name in ("questions", "images") if (value := getattr(arguments, name)) is not None}
    policy = PackPolicy(**{"vision_rank": trained.VISION_RANK} | ranks_of(arguments))
    steps.begin("loading the model")
    trained.run(load(str(trained_model())), replace(settings, **given), policy, arguments.out, steps)


def _own(arguments: argparse.Namespace, steps: Steps) -> None:
    images, ranks = open_images(arguments.image), ranks_of(arguments)
    policy = PackPolicy(**ranks)
    steps.begin("loading the model")
    loaded = load(arguments.model, arguments.dtype or "float32", ranks)
    own.run(loaded, arguments.prompt, images, arguments.max_new_tokens or 64, policy, arguments.out, steps)
