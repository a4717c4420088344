"""What is wrong with a stage that its parameters alone show. Light: runs while a recipe is validated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from kdkit.api.specs import NAME
from kdkit.plugins.stages.slots import FORCED, all_needs, metric_key, metric_needs, reward_keys

if TYPE_CHECKING:
    from kdkit.api import Weighted
    from kdkit.api.protocols import Loss
    from kdkit.plugins.stages.plugin import DistillParams, EvaluateParams, GenerateParams, SftParams

__all__ = ["check_distill", "check_evaluate", "check_generate", "check_sft", "uses_teacher"]

Problem: TypeAlias = tuple[tuple[str | int, ...], str]
Problems: TypeAlias = list[Problem]

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PASSED: Final = 1.0
_BASELINE: Final = "baseline-"


def uses_teacher(spec: Any) -> bool:
    """Whether a loss compares with a teacher: aligned and representation losses always do, whatever they say."""
    return spec.loss_kind in {"aligned", "representation"} or bool(spec.needs)


def _needs(spec: Any) -> frozenset[str]:
    return frozenset({"hidden"}) if spec.loss_kind == "representation" else frozenset(spec.needs)


def _check_losses(losses: list[Weighted[Loss]], gives: frozenset[str]) -> Problems:
    """Problems of losses that this stage cannot feed; ``gives`` is what its teacher gives, empty without one."""
    problems: Problems = []
    for index, loss in enumerate(losses):
        spec: Any = loss.found.spec
        where = ("losses", index, "use")
        if spec.loss_kind not in {"token", "aligned", "representation"}:
            problems.append((where, f"'{loss.name}' is a {spec.loss_kind} loss; this stage takes token losses"))
        elif uses_teacher(spec) and not gives:
            problems.append((where, f"'{loss.name}' needs a teacher; use a distill stage"))
        elif _needs(spec) and not _needs(spec) & gives:
            wants, has = " or ".join(sorted(_needs(spec))), ", ".join(sorted(gives))
            wants = wants.replace("hidden", "hidden states")
            problems.append((where, f"'{loss.name}' needs {wants}, the teacher gives {has}"))
    names = [loss.name for loss in losses]
    problems += [
        (("losses", index, "use"), f"'{name}' appears twice")
        for index, name in enumerate(names)
        if name in names[:index]
    ]
    return problems


def check_sft(params: SftParams) -> Problems:
    """Problems of an sft stage."""
    return _check_losses(params.losses, frozenset())


def check_distill(params: DistillParams) -> Problems:
    """Problems of a distill stage."""
    spec: Any = params.teacher.found.spec
    problems = _check_losses(params.losses, spec.gives)
    if not any(uses_teacher(_spec(loss)) for loss in params.losses):
        problems.append((("losses",), "no loss uses the teacher; add one, such as forward-kl, or use an sft stage"))
    return [*problems, *_mixed_kinds(params.losses), *_on_policy_problems(params)]


def _on_policy_problems(params: DistillParams) -> Iterator[Problem]:
    if not params.on_policy:
        if params.sampling is not None:
            yield ("sampling",), "the student writes answers only with on_policy above 0"
        return
    for index, loss in enumerate(params.losses):
        if _spec(loss).loss_kind == "aligned":
            why = "compares the texts of the data, which are aligned before training"
            yield ("losses", index, "use"), f"'{loss.name}' {why}; on_policy takes token losses, such as jsd"
        elif not uses_teacher(_spec(loss)):
            why = "needs no teacher, and without one the student's own answers (on_policy) teach nothing"
            yield (
                ("losses", index, "use"),
                f"'{loss.name}' {why}; use losses that compare with the teacher, such as jsd",
            )
    if _spec(params.teacher).fixed_rows:
        why = "knows only the data's answers, and on_policy asks about the student's own"
        yield ("teacher", "use"), f"'{params.teacher.name}' {why}; use a teacher that is present, such as local"


def _mixed_kinds(losses: list[Weighted[Loss]]) -> Iterator[Problem]:
    """A teacher is read in the student's tokens or in its own, not in both."""
    aligned = [loss.name for loss in losses if _spec(loss).loss_kind == "aligned"]
    for index, loss in enumerate(losses):
        if aligned and _spec(loss).loss_kind != "aligned" and uses_teacher(_spec(loss)):
            why = f"'{loss.name}' needs a teacher of the student's tokens, '{aligned[0]}' reads it in its own"
            yield ("losses", index, "use"), f"{why}; use one of them, with cross-entropy if you like"


def check_generate(params: GenerateParams) -> Problems:
    """Problems of a generate stage."""
    spec: Any = params.teacher.found.spec
    if "text" not in spec.gives:
        return [(("teacher", "use"), f"'{params.teacher.name}' gives no text")]
    return []


def check_evaluate(params: EvaluateParams) -> Problems:
    """Problems of an evaluate stage."""
    return [
        *_metric_problems(params),
        *_teacher_problems(params),
        *_judge_problems(params),
        *_sampling_problems(params),
        *_name_problems(params),
    ]


def _metric_problems(params: EvaluateParams) -> Iterator[Problem]:
    keys, taken = list[str](), reward_keys(params.rewards)
    for index, metric in enumerate(params.metrics):
        where, needs = ("metrics", index, "use"), metric_needs(metric)
        if needs & FORCED and params.teacher is None:
            yield where, f"'{metric.name}' needs 'teacher' in this stage"
        if "verdict" in needs and params.judge is None:
            yield where, f"'{metric.name}' needs 'judge' in this stage: the reward that says whether an answer passes"
        # pass@k is undefined for fewer answers; that would show only after all of them were made.
        k = getattr(metric.params, "k", 1) if "verdict" in needs else 1
        if isinstance(k, int) and k > params.num_samples:
            yield (
                ("metrics", index, "k"),
                f"k = {k} needs num_samples of {k} or more, this stage has {params.num_samples}",
            )
        tokens = getattr(metric.params, "tokens", 0) if "exposure" in needs else 0
        longest = params.sampling.max_new_tokens
        if isinstance(tokens, int) and tokens > longest:
            need = f"{tokens} tokens of an answer need sampling.max_new_tokens of as many"
            yield ("metrics", index, "tokens"), f"{need}, this stage has {longest}"
        key = metric_key(metric)
        if not NAME.fullmatch(key):
            yield where, f"'{metric.name}' gives itself the key '{key}', which is not kebab-case"
        elif key in taken:
            yield where, f"'{metric.name}' gives itself the key '{key}', which is that of a reward of this stage"
        elif key in keys:
            first = keys.index(key)
            yield where, f"'{metric.name}' appears twice as '{key}' (first as metrics.{first})"
        keys.append(key)


def _teacher_problems(params: EvaluateParams) -> Iterator[Problem]:
    if params.teacher is None:
        return
    needs, spec = all_needs(params.metrics), _spec(params.teacher)
    if not needs & FORCED:
        yield ("teacher",), "no metric uses the teacher; add teacher-kl, or leave the teacher out"
    if "logits" not in spec.gives:
        yield ("teacher", "use"), f"'{params.teacher.name}' gives no logits"
    if "exposure" in needs and "text" not in spec.gives:
        using = ", ".join(f"'{metric.name}'" for metric in params.metrics if "exposure" in metric_needs(metric))
        yield ("teacher", "use"), f"'{params.teacher.name}' gives no text, which {using} needs"


def _judge_problems(params: EvaluateParams) -> Iterator[Problem]:
    if params.judge is None:
        return
    if "verdict" not in all_needs(params.metrics):
        yield ("judge",), "no metric uses the judge; add pass-at-k, or leave the judge out"
    highest = _spec(params.judge).range[1]
    if highest < _PASSED:
        yield ("judge", "use"), f"'{params.judge.name}' never gives more than {highest:g}, and an answer passes at 1"


def _sampling_problems(params: EvaluateParams) -> Iterator[Problem]:
    if params.num_samples > 1 and not params.sampling.do_sample:
        yield ("num_samples",), "greedy decoding gives the same answer every time; set sampling.do_sample: true"


def _name_problems(params: EvaluateParams) -> Iterator[Problem]:
    """Names become parts of file names: MODEL--DATASET.jsonl."""
    for slot, names in (("models", params.models), ("data", params.data)):
        for name in names:
            if not _FILE_NAME.fullmatch(name):
                yield (slot, name), f"'{name}' is no name; use letters, digits, '.', '_' and '-'"
            elif slot == "models" and name.startswith(_BASELINE):
                yield (slot, name), f"names that start with '{_BASELINE}' are those of the trivial baselines"
    seen: dict[str, str] = {}
    for model in params.models:
        for data in params.data:
            other = seen.setdefault(f"{model}--{data}", model)
            if other != model:
                yield ("models", model), f"'{model}' on '{data}' has the file name of '{other}' on another dataset"


def _spec(component: Any) -> Any:
    return component.found.spec
