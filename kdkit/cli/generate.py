"""Body of ``kdkit generate``: several models answer the same prompts, one model in memory at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from pydantic import ValidationError
from rich.console import Console

from kdkit.api.errors import ExitCode, RecipeError, StageError
from kdkit.api.params import Sampling
from kdkit.cli.answers import Row, plain, prompt_text, rich_rows
from kdkit.cli.output import emit, emit_json, log, safely, visible
from kdkit.cli.progress import View, make_view
from kdkit.cli.prompts import read_prompts
from kdkit.cli.subjects import Subject, find_subjects
from kdkit.engine.boundary import machine_error
from kdkit.engine.events import Event
from kdkit.engine.hardware import pick_device, resolve_precision
from kdkit.engine.stop import stop_on_signals

if TYPE_CHECKING:
    from kdkit.api.data import Example
    from kdkit.train.answers import Answer, Encoded

__all__ = ["Request", "generate"]

_SEED: Final = 17
"""As in a recipe that gives none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line.

    Attributes:
        models: Values of ``--model``.
        prompts: Values of ``--prompt``.
        file: Value of ``--prompts``.
        system: System message for every prompt that has none.
        raw: No chat template.
        max_new_tokens: Longest answer.
        temperature: None, as ``top_p`` and ``top_k``, when it was not given; with all three None decoding is greedy.
        top_p: See :class:`kdkit.api.Sampling`.
        top_k: See :class:`kdkit.api.Sampling`.
        seed: Of the draws; None when it was not given.
        precision: ``auto``, ``bf16`` or ``fp32``.
    """

    models: Sequence[str]
    prompts: Sequence[str]
    file: str | None = None
    system: str | None = None
    raw: bool = False
    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    precision: str = "auto"


@dataclass(slots=True)
class _Work:
    """What is asked of whom, and the answers so far."""

    examples: Sequence[Example]
    subjects: Sequence[Subject]
    encoded: Sequence[Encoded]
    sampling: Sampling
    seed: int
    precision: str
    device: str
    answers: dict[str, list[Answer]]


def generate(request: Request, *, as_json: bool) -> int:
    """Let every model answer every prompt and print the answers side by side.

    Everything that can be wrong with prompts, models and options is found before the first weights are loaded. When
    stopped, the answers so far are printed, except as JSON, which is whole or absent.

    Returns:
        0; 130 or 143 when stopped by a signal.

    Raises:
        RecipeError: An option is wrong, or nothing is asked.
        DataError: A prompt is unreadable, empty or too long for a model.
        ModelError: There is no such model, or it cannot be used.
        EnvironmentUnmet: A model has to be fetched first, or a file cannot be read.
        StageError: The memory is too small.
    """
    with stop_on_signals() as stop, stop.forwarded(first=_interrupt, second=_interrupt):
        work = None
        try:
            work = _prepare(request)
            _answer_all(work)
        except KeyboardInterrupt:
            if work is not None and not as_json and any(work.answers.values()):
                _print_text(work)
            log("stopped")
            return int(stop.exit_code if stop.requested() else ExitCode.INTERRUPTED)
    if as_json:
        emit_json(_to_json(work, request))
    else:
        _print_text(work)
    return int(ExitCode.OK)


def _interrupt() -> NoReturn:
    # Nothing here needs an orderly end: the first signal stops in the middle of an answer.
    raise KeyboardInterrupt


def _prepare(request: Request) -> _Work:
    sampling, seed = _sampling(request), _seed(request)
    _check_system(request)
    examples = read_prompts(request.prompts, request.file)
    subjects = find_subjects(request.models)
    from kdkit.train.answers import encode

    encoded = []
    for subject in subjects:
        found = encode(
            subject.model,
            examples,
            system=request.system,
            raw=request.raw,
            max_new_tokens=sampling.max_new_tokens,
        )
        if not found.templated and not request.raw:
            log(f"{visible(subject.label)}: no chat template, so it reads the prompt as raw text")
        encoded.append(found)
    precision, device = resolve_precision(request.precision), pick_device()
    answers: dict[str, list[Answer]] = {subject.label: [] for subject in subjects}
    return _Work(examples, subjects, encoded, sampling, seed, precision, device, answers)


def _sampling(request: Request) -> Sampling:
    """The decoding asked for; naming one of the sampling options turns sampling on."""
    given = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k")}
    given = {name: value for name, value in given.items() if value is not None}
    if request.seed is not None and not given:
        raise RecipeError(
            "greedy decoding draws nothing", where="--seed", hint="add --temperature, --top-p or --top-k to sample"
        )
    try:
        return Sampling(do_sample=bool(given), max_new_tokens=request.max_new_tokens, **given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise RecipeError(
            f"{first['msg'].lower()}, not {first['input']}",
            where="--" + name.replace("_", "-"),
            hint="leave it out for greedy decoding" if name == "temperature" else None,
        ) from error


def _seed(request: Request) -> int:
    return _SEED if request.seed is None else request.seed


def _check_system(request: Request) -> None:
    if request.system is None:
        return
    if request.raw:
        raise RecipeError("raw text has no system message", where="--system", hint="leave out --raw or --system")
    try:
        request.system.encode()
    except UnicodeEncodeError as error:
        raise RecipeError("is not valid Unicode text", where="--system") from error


def _answer_all(work: _Work) -> None:
    with make_view([visible(subject.label) for subject in work.subjects], sys.stderr) as view:
        for subject, encoded in zip(work.subjects, work.encoded, strict=True):
            _answer_one(work, subject, encoded, view)


def _answer_one(work: _Work, subject: Subject, encoded: Encoded, view: View) -> None:
    import torch

    from kdkit.train.answers import answers

    name, total = visible(subject.label), len(work.examples)
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    # The same draw for the same prompt, whoever answers and however many other prompts there are before it.
    seeds = [(work.seed + index) % 2**63 for index in range(total)]
    view.show(Event("stage-started", name, {"state": "run", "why": f"{work.precision} on {work.device}"}))
    said = work.answers[subject.label]
    try:
        for answer in answers(subject.model, encoded, work.sampling, seeds, dtype=dtype, device=work.device):
            said.append(answer)
            view.show(Event("progress", name, {"step": len(said), "total": total, "tokens_per_s": answer.tokens_per_s}))
    except (RuntimeError, MemoryError) as error:
        if (known := machine_error(error)) is None:
            raise
        raise StageError(
            known.what, where=subject.label, hint="a smaller model, shorter prompts or --precision bf16 need less"
        ) from error


def _print_text(work: _Work) -> None:
    rows = [_row(work, index) for index in range(len(work.examples))]
    if sys.stdout.isatty():
        console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
        safely(sys.stdout, lambda: rich_rows(rows, console))
    else:
        emit("\n".join(plain(rows)).rstrip("\n"))


def _row(work: _Work, index: int) -> Row:
    example, total = work.examples[index], len(work.examples)
    title = "prompt" if total == 1 else f"prompt {index + 1} of {total}"
    if not example.id.startswith("--prompt"):
        title += f" ({example.id})"
    said = {label: given[index] if index < len(given) else None for label, given in work.answers.items()}
    return Row(title, prompt_text(example), said)


def _to_json(work: _Work, request: Request) -> dict[str, Any]:
    return {
        "models": [
            {
                "label": subject.label,
                "model": subject.written,
                "path": str(subject.model.path),
                "chat_template": encoded.templated,
            }
            for subject, encoded in zip(work.subjects, work.encoded, strict=True)
        ],
        "system": request.system,
        "sampling": work.sampling.model_dump(),
        "seed": work.seed if work.sampling.do_sample else None,
        "precision": work.precision,
        "device": work.device,
        "prompts": [_prompt_json(work, index) for index in range(len(work.examples))],
    }


def _prompt_json(work: _Work, index: int) -> dict[str, Any]:
    example = work.examples[index]
    prompt = example.prompt
    return {
        "where": example.id,
        "prompt": prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt],
        "answers": {label: _answer_json(given[index]) for label, given in work.answers.items()},
    }


def _answer_json(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "seconds": answer.seconds,
        "tokens_per_s": answer.tokens_per_s,
        "truncated": answer.truncated,
    }
