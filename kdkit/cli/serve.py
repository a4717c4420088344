"""Body of ``kdkit serve-teacher``: a model behind the OpenAI protocol, until a signal comes."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from kdkit.api.errors import EnvironmentUnmet, RecipeError
from kdkit.cli.output import log, visible
from kdkit.cli.subjects import Subject, find_subjects
from kdkit.engine.hardware import pick_device, resolve_precision
from kdkit.engine.stop import stop_on_signals

if TYPE_CHECKING:
    from fastapi import FastAPI

    from kdkit.serve.batcher import Batcher
    from kdkit.serve.limits import Limits

__all__ = ["ServeRequest", "serve_teacher"]

_VARIABLE: Final = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
_SHORTEST_KEY: Final = 8
_LAST_BATCH_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRequest:
    """The command line.

    Attributes:
        model: ``[NAME=]MODEL``.
        host: Address to listen on.
        port: 0 lets the system choose.
        api_key_env: Name of the variable with the key, or None.
        precision: ``auto``, ``bf16`` or ``fp32``.
        batch_size: Prompts computed together.
        max_top_k: Log-probabilities per token.
        max_tokens: Tokens of a prompt with its answer.
        max_new_tokens: Tokens of an answer.
        max_requests: Requests under way.
    """

    model: str
    host: str
    port: int
    api_key_env: str | None
    precision: str
    batch_size: int
    max_top_k: int
    max_tokens: int
    max_new_tokens: int
    max_requests: int


def serve_teacher(request: ServeRequest) -> int:
    """Serve a model until Ctrl-C or SIGTERM.

    Returns:
        130 or 143: it ends by a signal only.

    Raises:
        RecipeError: The address needs a key.
        ModelError: There is no such model, or it cannot be used.
        EnvironmentUnmet: The extra is missing, the variable is not set, or the port is taken.
    """
    limits = _limits(request)
    key = _key(request.api_key_env)
    try:
        from kdkit.serve.run import HttpServer, check_host, listen
    except ModuleNotFoundError as error:
        hint = "install it with: pip install 'kdkit[serve]'"
        raise EnvironmentUnmet(f"serve-teacher needs the extra 'serve', which lacks {error.name}", hint=hint) from error

    check_host(request.host, has_key=key is not None)
    (subject,) = find_subjects([request.model])
    with stop_on_signals() as stop, listen(request.host, request.port) as found:
        try:
            with stop.forwarded(first=_interrupt, second=_interrupt):
                app, batcher = _application(request.precision, subject, key, limits)
        except KeyboardInterrupt:
            log("stopped")
            return int(stop.exit_code)
        host, port = found.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log(f"{visible(subject.label)} at http://{shown}:{port}/v1, {'with a key' if key else 'without a key'}")
        server = HttpServer(app)
        with stop.forwarded(first=server.stop, second=server.stop_at_once):
            server.run(sockets=[found])
    log("stopped")
    if not batcher.close(timeout=_LAST_BATCH_SECONDS):
        # A batch cannot be interrupted, and nobody waits for its result any more.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(int(stop.exit_code))
    return int(stop.exit_code)


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt


def _limits(request: ServeRequest) -> Limits:
    from kdkit.serve.limits import Limits

    for option, value, most in (
        ("--batch-size", request.batch_size, 4096),
        ("--max-top-k", request.max_top_k, 512),
        ("--max-tokens", request.max_tokens, 2**24),
        ("--max-new-tokens", request.max_new_tokens, 2**24),
        ("--max-requests", request.max_requests, 4096),
    ):
        if not 1 <= value <= most:
            raise RecipeError(f"is {value}", where=option, allowed=f"1 to {most:,}")
    if not 0 <= request.port < 2**16:
        raise RecipeError(f"is {request.port}", where="--port", allowed="0 to 65,535")
    return Limits(
        batch_rows=request.batch_size,
        top_k=request.max_top_k,
        prompt_tokens=request.max_tokens,
        new_tokens=request.max_new_tokens,
        requests=request.max_requests,
    )


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    if not _VARIABLE.fullmatch(name):
        # Not shown: it may be the key itself.
        raise RecipeError("is the name of an environment variable in capitals, not the key", where="--api-key-env")
    key = os.environ.get(name, "").strip()
    if len(key) < _SHORTEST_KEY or not (key.isascii() and key.isprintable() and " " not in key):
        what = "is not set" if not key else f"is no key of {_SHORTEST_KEY} or more printable characters"
        raise EnvironmentUnmet(f"the environment variable {name} {what}", where="--api-key-env")
    return key


def _application(precision: str, subject: Subject, key: str | None, limits: Limits) -> tuple[FastAPI, Batcher]:
    """The application and what computes behind it, with the model loaded."""
    import torch

    from kdkit.serve.app import TeacherApi
    from kdkit.serve.batcher import Batcher
    from kdkit.serve.model import ServedModel

    resolved, device = resolve_precision(precision), pick_device()
    log(f"{visible(subject.label)}: {resolved} on {device}")
    dtype = torch.bfloat16 if resolved == "bf16" else torch.float32
    model = ServedModel(subject.model, dtype=dtype, device=device)
    batcher = Batcher(model, limits)
    return TeacherApi(model, batcher, name=subject.label, key=key, limits=limits).app(), batcher
