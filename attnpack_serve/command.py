"""`attnpack serve`: load, compile, measure, and answer until it is told to stop."""

import argparse
import os
import socket
from pathlib import Path
from typing import Any

import torch
import uvicorn
from PIL import Image

import attnpack_fx
from attnpack_cli.arguments import ranks_of
from attnpack_cli.errors import UserError
from attnpack_cli.serve import LOOPBACK
from attnpack_fx.demo.load import load
from attnpack_fx.policy import PackPolicy, PolicyError
from attnpack_serve.app import create_app
from attnpack_serve.capacity import measured
from attnpack_serve.engine import Engine
from attnpack_serve.images import ImageLimits
from attnpack_serve.limits import Limits
from attnpack_serve.prompts import BadPromptError, Prompts

#: Graphs of a decoder layer, for as many kinds of requests as a server of up to 16 images meets.
_KINDS = 256
#: Connections beyond those that are answered or wait: of clients that keep theirs, or are told to come again.
_CONNECTIONS = 64


def run(arguments: argparse.Namespace) -> None:
    """Serve a model until the process is told to stop.

    Raises:
        UserError: for a model without a chat template, a policy it cannot have, or memory in which no prompt fits.
    """
    listening = _listening(arguments.host, arguments.port)
    loaded = load(arguments.model, arguments.dtype or "float32", ranks_of(arguments))
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded.model.to(device)
        policy = PackPolicy.load(arguments.policy) if arguments.policy else PackPolicy(**ranks_of(arguments))
        _let_many_kinds_compile()
        attnpack_fx.compile(loaded.model, policy=policy)
        prompts = Prompts(loaded)
    except (PolicyError, BadPromptError, OSError, RuntimeError) as error:
        raise UserError(str(error)) from error
    memory = arguments.memory or _available(loaded.model)
    prefixes = memory // 8 if arguments.prefixes is None else arguments.prefixes
    if prefixes >= memory:
        raise UserError(
            f"--prefixes {prefixes}: expected less than the {memory} bytes for everything; give --memory more"
        )
    print(f"compiling, and measuring what a prompt takes of {memory / 1e9:.1f} GB", flush=True)
    shown = [Image.new("RGB", arguments.size)] * arguments.images if loaded.vision else []
    content = [*({"type": "image"} for _ in shown), {"type": "text", "text": "What is this?"}]
    example = prompts.prepare([{"role": "user", "content": content}], shown)
    capacity, batch = measured(loaded.model, example, memory, prefixes)
    if not batch:
        raise UserError(f"--memory {memory}: no prompt fits beside the model; give more")
    batch = min(batch, arguments.batch)
    limits = Limits(
        batch=batch,
        memory=memory,
        prefixes=prefixes,
        queue=arguments.queue,
        new_tokens=arguments.max_new_tokens,
        seconds=arguments.timeout,
        body=arguments.max_body,
    )
    images = ImageLimits(hosts=tuple(arguments.allow_urls))
    name = arguments.name or Path(arguments.model).resolve().name
    engine = Engine(loaded.model, loaded.tokenizer, capacity, limits)
    engine.warm(example)
    key = arguments.api_key or os.environ.get("ATTNPACK_API_KEY") or None
    hosts = LOOPBACK if arguments.host in LOOPBACK else ("*",)
    app = create_app(name, prompts, engine, limits, images, api_key=key, hosts=hosts)
    print(f"{name} answers up to {batch} prompts at once on http://{arguments.host}:{arguments.port}", flush=True)
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=round(arguments.timeout),
        timeout_keep_alive=5,
        # Bodies are read before anything can be said of them: connections are few, too.
        limit_concurrency=limits.queue + limits.batch + _CONNECTIONS,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """The server's socket: that it cannot be had is known before a model is loaded."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; give another port") from error
    return made


def _let_many_kinds_compile() -> None:
    """Raise Dynamo's limits: beyond them a kind of request would run uncompiled, its cache dense.

    Every number of images makes a kind, with every size of a batch, kept prompts and new ones.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _KINDS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 64 * _KINDS)


def _available(model: Any) -> int:
    """What is free for the model and all else: on its GPU, or half of what the machine has free."""
    if model.device.type == "cuda":
        return torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_allocated(model.device)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2
