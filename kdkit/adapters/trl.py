"""Reward functions of TRL as kdkit's rewards, and kdkit's rewards as reward functions of TRL.

TRL's trainers call ``fn(prompts=..., completions=..., completion_ids=..., **columns)`` with one entry per completion in
every argument, and take a list of floats; None stands where a reward does not apply. Prompts and completions are texts
(standard format) or lists of messages (conversational format), as the dataset has them.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any, Final, Literal, TypeAlias

from kdkit.api.data import Example, Message, RewardScore, Rollout
from kdkit.api.errors import ConformanceError, PluginError
from kdkit.api.protocols import Reward

__all__ = ["RewardFunction", "TrlReward", "TrlRewardFunction", "as_trl_reward", "from_trl_reward"]

RewardFunction: TypeAlias = Callable[..., Sequence[float | None]]
Format: TypeAlias = Literal["auto", "standard", "conversational"]

_FIELDS: Final = ("id", "completion", "references", "category", "echo")
"""What of an example a column may be made of, beside its extra columns."""
_OF_CALL: Final = ("prompts", "completions", "completion_ids")
_OF_TRAINER: Final = ("trainer_state", "environments")
"""What only TRL's trainer can give."""
_LOGGERS: Final = ("log_extra", "log_metric")
_NOT_COLUMNS: Final = frozenset({"prompt", "completion", *_OF_CALL, *_OF_TRAINER, *_LOGGERS})


def from_trl_reward(
    fn: RewardFunction,
    *,
    columns: Mapping[str, str] | None = None,
    format: Format = "auto",  # noqa: A002 - TRL's word
) -> TrlReward:
    """A reward of kdkit that asks a reward function of TRL.

    Give settings of the function with ``functools.partial``. The function sees the columns that examples have beside
    prompt and answer (``Example.extra``), under their names. A completion whose example lacks a column that the
    function requires is unscorable, and the function is not asked.

    Args:
        fn: The function. It must not be asynchronous, and must not require what only TRL's trainer has.
        columns: More columns, by the function's name for them: ``{"solution": "completion"}`` gives it the answer of
            the example. Allowed are ``completion``, ``references``, ``id``, ``category``, ``echo`` and extra columns.
        format: ``conversational`` gives lists of messages, ``standard`` texts; ``auto`` does as the example's prompt.

    Raises:
        PluginError: The function cannot be called as TRL calls reward functions, without TRL's trainer.
    """
    name = _name(fn)
    if not callable(fn):
        what = f"{fn!r} is no function"
        raise PluginError(what, where="from_trl_reward", hint="reward models are for TRL alone")
    inner = _unwrapped(fn)
    # inspect.iscoroutinefunction looks into neither partials nor instances with an asynchronous __call__.
    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None)):  # noqa: B004
        raise PluginError(
            f"{name} is asynchronous", where="from_trl_reward", hint="give a function that returns a list"
        )
    if hidden := [given.name for given in _parameters(fn) if given.kind is given.POSITIONAL_ONLY]:
        what = f"{name} takes {', '.join(hidden)} by position only, and is called by names"
        raise PluginError(what, where="from_trl_reward", hint="leave the / in its signature out")
    if lacking := [wanted for wanted in _OF_TRAINER if wanted in _required(fn)]:
        what = f"{name} requires {', '.join(lacking)}, which only TRL's trainer has"
        raise PluginError(what, where="from_trl_reward", hint="give it a default")
    if taken := _NOT_COLUMNS & set(columns or {}):
        raise PluginError(f"{', '.join(sorted(taken))} cannot be a column", where="from_trl_reward")
    if format not in ("auto", "standard", "conversational"):
        raise PluginError(f"no format {format!r}", where="from_trl_reward", allowed="auto, standard, conversational")
    return TrlReward(fn, columns=dict(columns or {}), format=format)


class TrlReward:
    """A reward that asks a function of TRL; made by :func:`from_trl_reward`."""

    def __init__(self, fn: RewardFunction, *, columns: Mapping[str, str], format: Format) -> None:  # noqa: A002
        self.__name__ = _name(fn)
        self._fn = fn
        self._columns = columns
        self._format = format
        self._accepted = _accepted(fn)
        self._required = [name for name in _required(fn) if name not in (*_OF_CALL, *_LOGGERS)]

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[RewardScore]:
        """See :class:`kdkit.api.Reward`.

        Raises:
            ConformanceError: The function returned another number of rewards, or one that is no number.
        """
        values = [self._values(rollout.example) for rollout in rollouts]
        scores: list[RewardScore | None] = [None] * len(rollouts)
        groups: dict[bool, list[int]] = {}
        for index, rollout in enumerate(rollouts):
            missing = [name for name in self._required if name not in values[index]]
            if missing:
                scores[index] = RewardScore.unscorable(f"the example has no {', '.join(missing)}")
            else:
                # The format is one for a call: what a function sees first tells it what the others are.
                groups.setdefault(self._is_conversational(rollout), []).append(index)
        for conversational, members in groups.items():
            found = self._ask([rollouts[i] for i in members], [values[i] for i in members], conversational)
            for index, score in zip(members, found, strict=True):
                scores[index] = score
        return [score for score in scores if score is not None]

    def _values(self, example: Example | None) -> dict[str, Any]:
        """The columns of one example; a column that it does not have is absent."""
        if example is None:
            return {}
        fields = {name: value for name in _FIELDS if (value := getattr(example, name)) not in (None, (), "")}
        if "references" in fields:
            fields["references"] = list(example.references)
        known = {**example.extra, **fields}
        named = {name: known[source] for name, source in self._columns.items() if source in known}
        return {**{name: value for name, value in example.extra.items() if name not in _NOT_COLUMNS}, **named}

    def _is_conversational(self, rollout: Rollout) -> bool:
        if self._format != "auto":
            return self._format == "conversational"
        return rollout.example is not None and not isinstance(rollout.example.prompt, str)

    def _ask(
        self,
        rollouts: Sequence[Rollout],
        values: Sequence[Mapping[str, Any]],
        conversational: bool,  # noqa: FBT001
    ) -> list[RewardScore]:
        names = dict.fromkeys([name for row in values for name in row] + list(self._columns))
        given: dict[str, Any] = {name: [row.get(name) for row in values] for name in names}
        given |= dict.fromkeys(_LOGGERS, _not_logged)
        given["completion_ids"] = [list(rollout.token_ids) for rollout in rollouts]
        given["prompts"] = [_messages(rollout) if conversational else rollout.prompt for rollout in rollouts]
        given["completions"] = [
            [{"role": "assistant", "content": rollout.text}] if conversational else rollout.text for rollout in rollouts
        ]
        if self._accepted is not None:
            given = {name: value for name, value in given.items() if name in self._accepted}
        return self._scores(self._fn(**given), len(rollouts))

    def _scores(self, returned: Any, count: int) -> list[RewardScore]:
        where = f"reward function {self.__name__}"
        rewards = _listed(returned)
        if rewards is None:
            what, allowed = f"it returned a {type(returned).__name__}", "a list with a float or None for each"
            raise ConformanceError(what, where=where, allowed=allowed)
        if len(rewards) != count:
            raise ConformanceError(f"it returned {len(rewards)} rewards for {count} completions", where=where)
        return [_score(reward, f"{where}: completion {index}") for index, reward in enumerate(rewards)]


def _listed(returned: Any) -> list[Any] | None:
    """What can be read in order; None of a set, which has none, and of a tensor without dimensions."""
    if isinstance(returned, str | bytes | Mapping | Set):
        return None
    try:
        items = iter(returned)
    except TypeError:
        return None
    return list(items)


def _score(reward: Any, where: str) -> RewardScore:
    if reward is None:
        return RewardScore.unscorable("the reward function gives None")
    try:
        value = float(reward)
    except (TypeError, ValueError) as error:
        raise ConformanceError(f"{reward!r} is no number", where=where, allowed="a float or None") from error
    if not math.isfinite(value):
        hint = "give None for a completion that cannot be scored"
        raise ConformanceError(f"a reward of {value}", where=where, allowed="a finite number or None", hint=hint)
    return RewardScore.of(value)


def as_trl_reward(reward: str | Reward, /, *, references: str | None = None, **params: Any) -> TrlRewardFunction:
    """A reward function for TRL's trainers that asks a reward of kdkit: ``as_trl_reward("length", max_tokens=200)``.

    Columns of the dataset become the example's extra columns, under their names: ``correctness`` finds its ``tests``
    there. None is returned for completions that are unscorable, and where the judge failed; TRL leaves both out of a
    group's baseline. What a trainer does not tell is not known here either: no completion counts as truncated.

    Args:
        reward: A built reward, or the name of one as a recipe has it (``length``, ``DIST/NAME``).
        references: The column with the right answer, or with a list of them.
        params: Parameters of the reward that is named, nested components written as in a recipe.

    Raises:
        RecipeError: There is no such reward, or its parameters are wrong.
        PluginError: Its plugin is missing or broken.
        TypeError: Parameters for a reward that is built already.
    """
    if isinstance(reward, str):
        import kdkit

        built = kdkit.build("reward", reward, **params)
        return TrlRewardFunction(built, name=reward.rpartition("/")[2], references=references)
    if params:
        raise TypeError(f"parameters ({', '.join(params)}) go with the name of a reward, not with one that is built")
    return TrlRewardFunction(reward, name=_name(reward), references=references)


class TrlRewardFunction:
    """A reward function of TRL that asks a reward of kdkit; made by :func:`as_trl_reward`.

    ``__name__`` is what TRL logs the reward under.
    """

    def __init__(self, reward: Reward, *, name: str, references: str | None = None) -> None:
        self.__name__ = name
        self._reward = reward
        self._references = references

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One value per completion, or None.

        Raises:
            ConformanceError: There is no column of references, or the reward gave another number of scores.
        """
        own = {name: column for name, column in columns.items() if name not in _NOT_COLUMNS}
        if self._references is not None and self._references not in own:
            what = f"the dataset has no column {self._references!r} with references"
            raise ConformanceError(what, where=f"reward {self.__name__}", allowed=", ".join(own) or None)
        rollouts = [
            Rollout(
                prompt=_text(prompt),
                text=_answer(completion),
                token_ids=tuple(completion_ids[index]) if completion_ids is not None else (),
                example=self._example(prompt, {name: column[index] for name, column in own.items()}),
            )
            for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        scores = list(self._reward(rollouts))
        if len(scores) != len(rollouts):
            what = f"{len(scores)} scores for {len(rollouts)} completions"
            raise ConformanceError(what, where=f"reward {self.__name__}")
        return [score.value if score.status == "ok" else None for score in scores]

    def close(self) -> None:
        """Close what the reward holds: sandboxes, models. TRL does not call it."""
        close = getattr(self._reward, "close", None)
        if close is not None:
            close()

    def _example(self, prompt: Any, row: Mapping[str, Any]) -> Example:
        references = () if self._references is None else _references(row[self._references])
        # Rewards tell groups by the id: the completions of a prompt share it.
        name = row.get("id")
        if name is None:
            name = hashlib.sha256(_text(prompt).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return Example(id=str(name), prompt=_prompt(prompt), references=references, extra=dict(row))


def _references(answers: Any) -> tuple[str, ...]:
    """A right answer, or several, as texts: a column may hold numbers."""
    several = answers if isinstance(answers, list | tuple) else [answers]
    return tuple(str(answer) for answer in several if answer is not None)


def _messages(rollout: Rollout) -> list[dict[str, str]]:
    prompt = rollout.example.prompt if rollout.example is not None else rollout.prompt
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": message.role, "content": message.content} for message in prompt]


def _prompt(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    return tuple(Message(message["role"], _content(message)) for message in prompt)


def _text(value: Any) -> str:
    """A text as it is; of messages their contents, a line each."""
    return value if isinstance(value, str) else "\n".join(_content(message) for message in value)


def _answer(completion: Any) -> str:
    """The model's words: between its turns there may be those of tools."""
    if isinstance(completion, str):
        return completion
    return _text([message for message in completion if message.get("role", "assistant") == "assistant"])


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(block.get("text") or "" for block in content)


def _not_logged(*args: Any, **named: Any) -> None:
    """Stands for TRL's loggers: what a function logs beside its rewards has no place here."""
    del args, named


def _unwrapped(fn: Any) -> Any:
    while isinstance(fn, partial):
        fn = fn.func
    return fn


def _name(fn: Any) -> str:
    inner = _unwrapped(fn)
    return str(getattr(inner, "__name__", type(inner).__name__))


def _parameters(fn: RewardFunction) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        # Compiled functions may have no signature: they get everything, as from TRL.
        return [inspect.Parameter("given", inspect.Parameter.VAR_KEYWORD)]


def _accepted(fn: RewardFunction) -> frozenset[str] | None:
    """The names a function takes; None when it takes any."""
    parameters = _parameters(fn)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def _required(fn: RewardFunction) -> list[str]:
    return [
        parameter.name
        for parameter in _parameters(fn)
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
