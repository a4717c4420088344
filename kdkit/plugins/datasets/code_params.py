"""Parameters of the code datasets. Light: no data library is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal, Self, TypeAlias

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from kdkit.api.artifacts import Dataset
from kdkit.api.slots import Ref
from kdkit.plugins.datasets.options import Dedup, SourceOptions, SplitOptions, StyleOptions

__all__ = [
    "HUB_BUGNET",
    "HUB_CODEFORCES",
    "HUB_CODESEARCHNET",
    "HUB_MBPP",
    "BugNetParams",
    "CodeLanguage",
    "CodeforcesParams",
    "IOProblemsParams",
    "MbppParams",
    "PyTorrentParams",
]

CodeLanguage: TypeAlias = Literal["python", "cpp", "all"]
HUB_BUGNET: Final = "alexjercan/bugnet"
HUB_CODESEARCHNET: Final = "code-search-net/code_search_net"
HUB_MBPP: Final = "google-research-datasets/mbpp"
HUB_CODEFORCES: Final = {"sft": "open-r1/codeforces-cots", "rl": "open-r1/codeforces"}
"""Task to Hub dataset."""


class BugNetParams(SplitOptions, StyleOptions, SourceOptions):
    """Program repair: a buggy program, its error and its status, and the program that was accepted next."""

    source: Ref[Dataset] = Ref(Dataset, HUB_BUGNET)
    """A file (.jsonl, .jsonl.gz, .json, .parquet) or a directory of them, a Hub id, or a stage's output. Columns of
    BugNet: problem_id, language, original_status, fail, pass, change, i1, i2, j1, j2, error, stderr, description,
    input, output; of these problem_id may be null and all after pass may be absent."""
    split: Literal["train", "validation", "test", "all"] = "train"
    """The part to take, by ``problem_id``: all pairs of a problem are in one part. Rows without a problem id are in no
    part, since nobody can tell what they share with others; ``all`` takes them too."""
    language: CodeLanguage = "python"
    """Take only programs in this language."""
    columns: Literal["auto", "as-named", "swapped"] = "auto"
    """Which column holds the buggy program. In the second revision of BugNet ``fail`` and ``pass`` are swapped by a bug
    in its generator. ``auto`` compares both programs with the line ranges i1..i2 and j1..j2, which index the buggy and
    the accepted program in every revision: it swaps a file that is swapped and says so, drops single rows that
    contradict the rest of their file, and fails when the rows of a file disagree. ``as-named`` and ``swapped`` check
    nothing."""
    prompt_style: Literal["chat", "paper", "template"] = "chat"
    """``chat`` makes one user message. ``paper`` is the prompt that the paper trained GPT-2 on, word for word, except
    that it names the row's language; see ``answer``. ``template`` is text from your own ``template``."""
    answer: Literal["code", "paper"] = "code"
    """With ``prompt_style: paper``: ``code`` makes the program alone the answer, so that metrics measure what is
    trained. ``paper`` is the published answer, which starts with ``Solution type``, while the reference stays the
    program alone: parse-rate, code-exact and exact-match of a perfect student are then 0, and perplexity and
    teacher-kl are measured on a text that was not trained."""
    template: Path | None = Field(None, validate_default=True)
    """A Jinja file for ``prompt_style: template``; it sees ``code``, ``error``, ``status``, ``description`` and
    ``language``."""
    description: bool = False
    """With ``prompt_style: chat``: show the statement of the problem, as text, before the program."""

    @model_validator(mode="after")
    def _description_fits(self) -> Self:
        if self.description and self.prompt_style != "chat":
            raise PydanticCustomError("description", "description: with prompt_style: chat only")
        return self

    @model_validator(mode="after")
    def _answer_fits(self) -> Self:
        if self.answer == "paper" and self.prompt_style != "paper":
            raise PydanticCustomError("answer", "answer: paper goes with prompt_style: paper only")
        return self


class PyTorrentParams(SplitOptions, StyleOptions, SourceOptions):
    """Python functions to write from their docstring or its summary, in PyTorrent's schema or CodeSearchNet's."""

    source: Ref[Dataset] = Ref(Dataset, HUB_CODESEARCHNET)
    """A file (.jsonl, .jsonl.gz, .json, .parquet) or a directory of them, a Hub id, or a stage's output. Columns of
    PyTorrent (original_string, docstring, summary, repo, partition, ...), of CodeSearchNet on the Hub
    (whole_func_string, func_documentation_string, repository_name, split_name, ...) or of CoSQA (doc, code, label).
    PyTorrent itself is no Hub dataset: unpack Zenodo record 4546290 and name the directory. Without a source the
    Hub's CodeSearchNet, configuration python, whose schema PyTorrent extends."""
    split: Literal["train", "validation", "test", "all"] = "train"
    """The part to take; see ``split_by``."""
    split_by: Literal["repo", "partition", "function"] = "repo"
    """What decides a row's part. ``repo``: a hash of the package or repository, so that none is in two parts.
    ``partition``: the column of that name (train, valid, test). ``function``: a hash of the function's code, for files
    of a few packages; code that a package repeats with changes can then be in two parts. Rows without a repository go
    by their code."""
    prompt_with: Literal["summary", "docstring", "summary+signature", "docstring+signature"] = "summary"
    """What the prompt tells: the summary (the docstring, where there is none) or the docstring, and with ``signature``
    the line or lines from ``def`` to the colon."""
    keep_docstring: bool = False
    """Leave the docstring in the code to write. The paper did, and so its answers repeat the prompt."""
    prompt_style: Literal["chat", "paper", "template"] = "chat"
    """``chat`` makes one user message. ``paper`` is the prompt that the paper trained GPT-2 on, word for word; see
    ``answer``, and add ``keep_docstring: true`` for its data as well. ``template`` is text from your own
    ``template``."""
    answer: Literal["code", "paper"] = "code"
    """With ``prompt_style: paper``: ``code`` makes the code alone the answer, so that metrics measure what is
    trained. ``paper`` is the published answer, framed by ``### solution code`` and
    ``### End of code``, while the reference stays the code alone: exact-match of a perfect student is then 0, and
    perplexity and teacher-kl are measured on a text that was not trained."""
    template: Path | None = Field(None, validate_default=True)
    """A Jinja file for ``prompt_style: template``; it sees ``text``, ``signature`` and ``name``."""

    @model_validator(mode="after")
    def _signature_fits(self) -> Self:
        if self.prompt_style == "paper" and self.prompt_with.endswith("+signature"):
            raise PydanticCustomError("prompt_with", "prompt_with: prompt_style: paper has no place for a signature")
        return self

    @model_validator(mode="after")
    def _answer_fits(self) -> Self:
        if self.answer == "paper" and self.prompt_style != "paper":
            raise PydanticCustomError("answer", "answer: paper goes with prompt_style: paper only")
        return self


class CodeforcesParams(SplitOptions, StyleOptions, SourceOptions):
    """Competitive programming: reasoning traces to learn from, or problems with tests to be judged by."""

    task: Literal["sft", "rl"] = "sft"
    """``sft`` takes rows with an answer (codeforces-cots), ``rl`` problems with tests and without an answer."""
    source: Ref[Dataset] = Ref(Dataset, HUB_CODEFORCES["sft"])
    """A file (.jsonl, .jsonl.gz, .json, .parquet) or a directory of them, a Hub id, or a stage's output. Without it the
    Hub's open-r1/codeforces-cots for ``task: sft`` and open-r1/codeforces for ``task: rl``; their ``config`` is, unless
    given, solutions_py_decontaminated for Python and else solutions_decontaminated, and verifiable."""
    split: Literal["train", "validation", "test", "all"] = "train"
    """The part to take, by problem: all answers to it, in all languages and under all its aliases, are in one part."""
    language: CodeLanguage = "python"
    """Take answers in this language (told by the last code block), or problems to be solved in it."""
    prompt_style: Literal["chat", "think", "paper", "template"] = "chat"
    """``chat`` is the prompt that the row brings, or one made from its statement; ``think`` adds a system message that
    asks for numbered steps between <think> tags and one code block; ``paper`` adds the system message of the paper's
    GRPO run, that of DeepSeek-R1-Zero, which asks for <think> and <answer> (``task: rl`` only); ``template`` is text
    from your own ``template``."""
    template: Path | None = Field(None, validate_default=True)
    """A Jinja file for ``prompt_style: template``; it sees ``title``, ``description``, ``input_format``,
    ``output_format``, ``note``, ``examples``, ``limits``, ``language`` and ``prompt`` (that of ``chat``)."""
    traces: bool = True
    """For ``task: sft``: keep the text between <think> tags in the answer; false leaves only what follows it."""
    unfinished: bool = False
    """For ``task: sft``: keep answers that were cut at the token limit or whose <think> is never closed."""
    incomplete_tests: bool = False
    """For ``task: rl``: keep problems of which only some official tests are known. Wrong programs can pass them."""
    generated_tests: Path | None = None
    """For ``task: rl``: directory with the files ``test_cases_NNNN.parquet`` of open-r1/codeforces, whose tests are
    added to those of the row."""
    max_tests_bytes: int = Field(4_000_000, ge=1)
    """For ``task: rl``: room for the tests of one problem. Tests that do not fit are left out, and counted in the log
    and in the example's ``tests_left_out``."""

    @model_validator(mode="before")
    @classmethod
    def _source_of_task(cls, data: Any) -> Any:
        if isinstance(data, dict) and "source" not in data and data.get("task") in HUB_CODEFORCES:
            return {**data, "source": HUB_CODEFORCES[data["task"]]}
        return data

    @model_validator(mode="after")
    def _task_fits(self) -> Self:
        other = ("incomplete_tests", "generated_tests", "max_tests_bytes") if self.task == "sft" else _SFT_ONLY
        given = [name for name in other if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            values = {"names": ", ".join(given), "task": self.task}
            raise PydanticCustomError("task", "{names}: means nothing with task: {task}", values)
        if self.task == "sft" and self.prompt_style == "paper":
            raise PydanticCustomError("task", "prompt_style: paper asks for <answer>, which no row of task: sft has")
        if self.task == "rl" and self.language == "all":
            raise PydanticCustomError("task", "language: task: rl needs one, since the prompt and the judge do")
        return self


_SFT_ONLY: Final = ("traces", "unfinished")


class IOProblemsParams(SplitOptions):
    """Programs of a few lines: read one line of numbers or words, keep, change, print. Generated, with tests.

    A template is one choice of operations, such as numbers/even/add/sum; its problems differ in constants, wording and
    tests. All problems of a template are in one part, so that ``test`` asks for combinations that training never
    showed, of operations that it did show.
    """

    task: Literal["sft", "rl"] = "sft"
    """``sft`` has answers, ``rl`` has none. Both have the tests."""
    test_fraction: float = Field(0.25, ge=0, lt=1)
    """Share of the templates in ``test``."""
    validation_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the templates in ``validation``."""
    per_template: int = Field(8, ge=1, le=1000)
    """Problems of each template; those that come out the same are duplicates."""
    max_level: int = Field(3, ge=1, le=3)
    """Most operations after reading the line: 1, 2 or 3."""
    think: bool = True
    """Ask for numbered steps between <think> tags, and show them in answers."""


class MbppParams(SplitOptions, StyleOptions, SourceOptions):
    """Mostly Basic Python Problems: a sentence to write a function from, judged by assertions about it.

    Its 974 numbered tasks have official parts; problems of your own in its columns go by a hash of their text.
    """

    task: Literal["sft", "rl"] = "sft"
    """``sft`` has the reference programs for answers, ``rl`` has none. Both have the tests, and ``rl`` leaves out
    problems with a test that ``correctness`` cannot judge, counted as ``unjudgeable`` and named in the log."""
    source: Ref[Dataset] = Ref(Dataset, HUB_MBPP)
    """A file (.jsonl, .jsonl.gz, .json, .parquet) or a directory of them, a Hub id, or a stage's output. Columns:
    task_id, text (or prompt, as in the sanitized form), code, test_list, and optionally test_setup_code (run after the
    program, before its tests) and test_imports. Without a source the Hub's google-research-datasets/mbpp; ``config``
    sanitized takes its verified part."""
    split: Literal["train", "validation", "test", "all"] = "train"
    """The part to take, by task_id as published: ``test`` 11 to 510, ``validation`` 511 to 600, ``train`` 601 to 974.
    Tasks 1 to 10, the examples of few-shot prompts, are in no part; ``all`` takes them too."""
    dedup: Dedup = "none"
    """Duplicates; ``none`` keeps the published parts whole (two tasks of ``test`` ask the same). ``exact`` and
    ``prompt`` are as elsewhere, and without answers the same."""
    shown_tests: int = Field(1, ge=0)
    """How many tests the prompt shows, the first ones: they tell the name of the function and its arguments. Published
    results show all (3), which a program can pass by knowing their answers. Without any the prompt names the function
    and counts its arguments."""
    prompt_style: Literal["chat", "think", "template"] = "chat"
    """``chat`` is one user message; ``think`` adds a system message that asks for numbered steps between <think> tags
    and one code block (``task: rl`` only, since no answer reasons); ``template`` is text from your own ``template``."""
    template: Path | None = Field(None, validate_default=True)
    """A Jinja file for ``prompt_style: template``; it sees ``text``, ``function`` (its name) and ``tests`` (those that
    are shown)."""

    @model_validator(mode="after")
    def _task_fits(self) -> Self:
        if self.task == "sft" and self.prompt_style == "think":
            raise PydanticCustomError("task", "prompt_style: think asks for reasoning, which no row of task: sft has")
        return self
