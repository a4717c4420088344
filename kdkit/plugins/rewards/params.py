"""Parameters of the built-in rewards. Light: nothing heavy is imported."""

from __future__ import annotations

from typing import Any, Final, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from kdkit.api.artifacts import Model
from kdkit.api.params import Params
from kdkit.api.protocols import Metric, Reward, Teacher
from kdkit.api.sandboxes import Sandbox
from kdkit.api.slots import Component, Ref

__all__ = [
    "CorrectnessParams",
    "LanguageParams",
    "LengthParams",
    "RepetitionParams",
    "RougeParams",
    "StepsParams",
    "TeacherLogprobParams",
    "ThinkParams",
]


class ThinkParams(Params):
    """One `<think>...</think>` that begins the completion and holds something, and an answer after it: 1.

    White space may stand before it. Tags that are repeated, nested, never closed or written in another way
    (`<THINK>`), and thoughts without a letter or digit, earn nothing. Where the prompt itself ends with `<think>`, the
    completion starts inside the thought and has the closing tag only.
    """

    partial: float = Field(0.5, ge=0, lt=1)
    """What a completion earns with one well-formed, non-empty thought and one flaw: text before the thought, or no
    answer (with `answer_tags`: no well-formed answer) after it. Both flaws earn nothing."""
    answer_tags: bool = False
    """The thought must be followed by one non-empty `<answer>...</answer>` and nothing else, as the system message of
    `prompt_style: paper` asks."""


class StepsParams(Params):
    """Numbered steps inside a well-formed thought: lines that begin with `Step k` or `**Step k**`, each with content.

    The value is the number of steps over `steps`, 1 at most. Everything is lost when the numbers are not 1, 2, 3, ...,
    when a step is empty, when two steps say the same (numbers, order and repetition of words do not matter), or when
    there are more than `max_steps`. Steps outside the thought earn nothing.
    """

    steps: int = Field(3, ge=1)
    """Steps that earn the whole reward."""
    max_steps: int = Field(20, ge=1)
    """More steps earn nothing."""
    min_words: int = Field(2, ge=1)
    """Distinct words other than numbers that make the content of a step."""

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.max_steps < self.steps:
            raise PydanticCustomError("steps", "max_steps: is at least steps")
        return self


class CorrectnessParams(Params):
    """The last program of the answer, run on the example's tests in a sandbox: 1 when it passes all of them.

    The answer is what follows `</think>`; a program inside a thought, or in a block that is not closed, does not
    count. Of the blocks in the wanted language the last is taken, else the last one without a language. Without a
    program the value is 0.

    Tests, `language`, `time_limit` (seconds), `memory_limit` (megabytes) and `checker` are read from the example's
    extra columns, as the dataset `codeforces` with `task: rl` has them. Tests may also be assertions about functions,
    such as `assert f(1) == [2]`, as the dataset `mbpp` has them: the call is made in the sandbox, and its result is
    compared outside of it as Python's `==` does (1, 1.0 and True are equal, a list and a tuple are not), with
    `float_tolerance`; a result that is an object of the program's own is wrong. Other assertions than comparisons
    with a literal (`==`, `is True`, `math.isclose`), and calls that are to be true or false, make an example
    unscorable, as the lack of tests does. What
    the sandbox fails to judge after two more tries is an infrastructure error and never 0. The verdict over several
    tests is the gravest of IE, SV, CE, TLE, MLE, OLE, RE, WA, PE, AC.
    """

    sandbox: Component[Sandbox] = Field(default={"use": "auto"}, validate_default=True)
    """Where programs and checkers run."""
    scoring: Literal["pass_fail", "partial", "weighted_sum"] = "pass_fail"
    """`pass_fail`: 1 or 0; the first failed test ends it. `partial`: the share of tests passed, which also pays
    programs that always print the commonest answer. `weighted_sum`: pass_fail plus `partial_weight` times partial,
    over 1 plus `partial_weight`, so that 1 still means that all tests passed."""
    partial_weight: float = Field(0.1, gt=0, le=1)
    """Weight of the share of tests passed in `weighted_sum`."""
    tests: Literal["auto", "official", "examples"] = "auto"
    """`official` takes the column `official_tests`, `tests` or `test_list`; `examples` those of the statement; `auto`
    the first of these that is there."""
    max_tests: int | None = Field(None, ge=1)
    """Run only so many, the first ones. Wrong programs pass few tests more easily."""
    language: Literal["auto", "python", "cpp"] = "auto"
    """The language of programs; `auto` is that of the example, or Python."""
    comparison: Literal["tokens", "exact"] = "tokens"
    """`tokens` compares what stands between white space, and needs as many tokens as expected; `exact` all characters
    but line ends at the end, and calls different white space PE; results of functions have no tolerance then. Where an
    example has a checker, that decides."""
    float_tolerance: float = Field(1e-6, ge=0, lt=1)
    """With `tokens`: absolute or relative distance to numbers that are expected with a point or an exponent. Whole
    numbers are compared exactly, or within this absolute distance when the output has a point. 0 compares texts."""
    time_limit: float = Field(2.0, gt=0)
    """CPU seconds per test for examples that have no `time_limit`."""
    time_factor: float | Literal["auto"] = Field("auto")
    """Time limits are multiplied by it, since they are made for C++: `auto` is 3 for Python and 1 for C++."""
    max_time: float = Field(15.0, gt=0)
    """CPU seconds per test at most. The wall clock may take twice the CPU time and a second."""
    memory_mb: float = Field(512.0, gt=0)
    """Megabytes for examples that have no `memory_limit`; a program never has fewer than 64."""
    max_memory_mb: float = Field(1024.0, ge=64)
    """Megabytes at most."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if "partial_weight" in self.model_fields_set and self.scoring != "weighted_sum":
            raise PydanticCustomError("scoring", "partial_weight: means nothing without scoring: weighted_sum")
        if "float_tolerance" in self.model_fields_set and self.comparison == "exact":
            raise PydanticCustomError("comparison", "float_tolerance: means nothing with comparison: exact")
        if self.time_factor != "auto" and self.time_factor <= 0:
            raise PydanticCustomError("time_factor", "time_factor: is above 0")
        return self


class LengthParams(Params):
    """The length of a completion in tokens, in one of three shapes.

    `cosine` scales with correctness: right completions earn `correct_short` when they are short, falling along half a
    cosine to `correct_long` at `max_tokens` and beyond; wrong ones go from `wrong_short` to `wrong_long`, which are
    both 0 unless you say otherwise: a wrong answer that earns more when it is longer teaches padding. `target` pays 1
    from `min_tokens` to `max_tokens`, falling to 0 within `margin` tokens on both sides. `overlong` is 0 up to
    `margin` tokens before `max_tokens`, then falls to -1 there (DAPO).
    """

    shape: Literal["cosine", "target", "overlong"] = "cosine"
    """Which function of the length."""
    max_tokens: int = Field(1024, ge=1)
    """The longest completion that counts as it is; usually the stage's `max_completion_length`."""
    min_tokens: int = Field(1, ge=1)
    """For `target`: the shortest completion that earns everything. None of no tokens earns anything."""
    margin: int = Field(256, ge=0)
    """For `target` and `overlong`: over how many tokens the value falls."""
    correct_short: float = Field(1.0, ge=-1, le=1)
    """For `cosine`: a right completion of no tokens."""
    correct_long: float = Field(0.5, ge=-1, le=1)
    """For `cosine`: a right completion of `max_tokens` or more."""
    wrong_short: float = Field(0.0, ge=-1, le=1)
    """For `cosine`: a wrong completion of no tokens."""
    wrong_long: float = Field(0.0, ge=-1, le=1)
    """For `cosine`: a wrong completion of `max_tokens` or more."""
    correctness: Component[Reward] | None = None
    """The reward that says what is right: its value is 1. `cosine` takes `{use: correctness}` unless told otherwise;
    `target` then pays right completions only, and without it all; `overlong` does not ask. A program that the recipe's
    own `correctness` has judged in the same sandbox is not run again."""

    @model_validator(mode="before")
    @classmethod
    def _cosine_asks(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("shape", "cosine") == "cosine" and data.get("correctness") is None:
            return {**data, "correctness": {"use": "correctness"}}
        return data

    @model_validator(mode="after")
    def _fits(self) -> Self:
        other = sorted(self.model_fields_set & _OF_OTHER_SHAPES[self.shape])
        if other:
            values = {"names": ", ".join(other), "shape": self.shape}
            raise PydanticCustomError("shape", "{names}: means nothing with shape: {shape}", values)
        if self.shape == "target" and self.min_tokens > self.max_tokens:
            raise PydanticCustomError("shape", "min_tokens: is at most max_tokens")
        if self.shape == "overlong" and self.margin > self.max_tokens:
            raise PydanticCustomError("shape", "margin: is at most max_tokens")
        return self


_COSINE: Final = frozenset({"correct_short", "correct_long", "wrong_short", "wrong_long"})
_OF_OTHER_SHAPES: Final = {
    "cosine": frozenset({"min_tokens", "margin"}),
    "target": _COSINE,
    "overlong": _COSINE | {"min_tokens", "correctness"},
}


class RepetitionParams(Params):
    """Minus the share of n-grams of words that stand in the completion before: 0 when nothing is repeated.

    A word is a run of letters and digits, every character in scripts without spaces, or a piece of a run that is too
    long to be one. A completion without a word gets -1, one of fewer than `n` words 0.
    """

    n: int = Field(3, ge=1)
    """Words in a row."""


class LanguageParams(Params):
    """The share of the prose that is in one language: letters of its script, outside code blocks.

    For English, Spanish, German, French, Italian and Portuguese it is multiplied by the share of that language among
    the words that stand in only one of six short lists of commonest words, once there are five of them. Fewer than 20
    letters earn their part of 20; none earns nothing. It tells languages apart roughly, not their quality.
    """

    language: Literal["en", "es", "de", "fr", "it", "pt", "ru", "el", "ar", "he", "hi", "th", "ko", "ja", "zh"]
    """The language, by its two-letter code."""


class RougeParams(Params):
    """Closeness of the answer, without the thought, to the example's references, from 0 to 1. For tasks without tests.

    Examples without a reference are unscorable.
    """

    metric: Component[Metric] = Field(default={"use": "rouge-l"}, validate_default=True)
    """The metric, which must compare answers with references on a scale of 0 to 100."""


class TeacherLogprobParams(Params):
    """How probable the completion is to a teacher: the mean log-probability of its tokens, in nats, over `floor`.

    The value is between -1 (a mean of minus `floor` or less) and 0 (the teacher is certain of every token). Short,
    common and repetitive completions are probable, too: use it beside rewards that ask for an answer. Completions of no
    tokens get -1.
    """

    teacher: Component[Teacher]
    """The teacher; one that gives full logits."""
    tokenizer: Ref[Model]
    """The student, or a model with its tokenizer, which must be the teacher's as well."""
    floor: float = Field(5.0, gt=0)
    """Nats per token at which nothing is left to lose; uniform guessing over 150,000 tokens costs 12."""
    batch_size: int = Field(8, ge=1)
    """Completions in one forward pass of the teacher."""
