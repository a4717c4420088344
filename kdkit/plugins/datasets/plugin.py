"""The built-in datasets. Light: the loaders are imported when one is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal

from pydantic import model_validator

from kdkit.api.artifacts import Dataset
from kdkit.api.hookspecs import hookimpl
from kdkit.api.protocols import DatasetLoader
from kdkit.api.slots import Ref
from kdkit.api.specs import DatasetSpec
from kdkit.plugins.datasets.code_params import (
    BugNetParams,
    CodeforcesParams,
    IOProblemsParams,
    MbppParams,
    PyTorrentParams,
)
from kdkit.plugins.datasets.options import PromptOptions, SourceOptions, SplitOptions

__all__ = ["HUB_DOLLY", "DollyParams", "InstructionsParams", "JsonlParams", "kdkit_datasets"]

HUB_DOLLY: Final = {
    "en": ("databricks/databricks-dolly-15k", "train"),
    "es": ("argilla/databricks-dolly-15k-curated-multilingual", "es"),
}
"""Language to Hub dataset and its split."""


class DollyParams(SplitOptions, PromptOptions, SourceOptions):
    """Instruction rows: Dolly in English or Spanish, or any file with its columns or those of MiniLLM's files."""

    source: Ref[Dataset] = Ref(Dataset, HUB_DOLLY["en"][0])
    """A file (.jsonl, .jsonl.gz, .json, .parquet) or a directory of them, a Hub id, or a stage's output. Without it the
    Hub's dataset of the language: databricks/databricks-dolly-15k, or the split es of
    argilla/databricks-dolly-15k-curated-multilingual. Columns: instruction; context or input; response or output (a
    text, or a list whose first entry is learned and all of which are references); category or topic."""
    language: Literal["en", "es"] = "en"
    """Language of the default source and of the headings of ``prompt_style: alpaca``."""

    @model_validator(mode="before")
    @classmethod
    def _source_of_language(cls, data: Any) -> Any:
        if isinstance(data, dict) and "source" not in data and data.get("language") in HUB_DOLLY:
            return {**data, "source": HUB_DOLLY[data["language"]][0]}
        return data


class JsonlParams(SplitOptions, SourceOptions):
    """Rows with ``messages``, with ``prompt`` and ``completion``, or with ``prompt`` alone."""

    split: Literal["train", "validation", "test", "all"] = "all"
    """The part to take; ``all`` is everything in the source. A row's part follows from a hash of its prompt: it depends
    neither on the order of the rows nor on other rows, and rows with the same prompt are always in one part."""
    every_turn: bool = True
    """For rows with ``messages``: learn every turn of the assistant, not only the last one."""


class InstructionsParams(SplitOptions, PromptOptions):
    """The 480 English prompts that ship with kdkit."""


def _dolly(params: DollyParams) -> DatasetLoader:
    from kdkit.plugins.datasets.dolly import DollyLoader

    return DollyLoader(params)


def _jsonl(params: JsonlParams) -> DatasetLoader:
    from kdkit.plugins.datasets.jsonl import JsonlLoader

    return JsonlLoader(params)


def _instructions(params: InstructionsParams) -> DatasetLoader:
    from kdkit.plugins.datasets.instructions import InstructionsLoader

    return InstructionsLoader(params)


def _io_problems(params: IOProblemsParams) -> DatasetLoader:
    from kdkit.plugins.datasets.io_problems import IOProblemsLoader

    return IOProblemsLoader(params)


def _bugnet(params: BugNetParams) -> DatasetLoader:
    from kdkit.plugins.datasets.bugnet import BugNetLoader

    return BugNetLoader(params)


def _pytorrent(params: PyTorrentParams) -> DatasetLoader:
    from kdkit.plugins.datasets.pytorrent import PyTorrentLoader

    return PyTorrentLoader(params)


def _codeforces(params: CodeforcesParams) -> DatasetLoader:
    from kdkit.plugins.datasets.codeforces import CodeforcesLoader

    return CodeforcesLoader(params)


def _mbpp(params: MbppParams) -> DatasetLoader:
    from kdkit.plugins.datasets.mbpp import MbppLoader

    return MbppLoader(params)


@hookimpl
def kdkit_datasets() -> Iterator[DatasetSpec[Any]]:
    """The built-in datasets."""
    yield DatasetSpec(
        name="dolly",
        summary="Dolly instructions in English or Spanish, and files with its columns",
        params=DollyParams,
        build=_dolly,
        version=2,
    )
    yield DatasetSpec(
        name="jsonl",
        summary="Your rows: messages, prompt and completion, or prompts; also a stage's output",
        params=JsonlParams,
        build=_jsonl,
        version=2,
    )
    yield DatasetSpec(
        name="instructions",
        summary="480 prompts in eight categories that ship with kdkit, without answers",
        params=InstructionsParams,
        build=_instructions,
        rows="prompt-only",
    )
    yield DatasetSpec(
        name="bugnet",
        summary="Program repair in Python and C++: buggy code and its error to accepted code",
        params=BugNetParams,
        build=_bugnet,
        version=2,
    )
    yield DatasetSpec(
        name="pytorrent",
        summary="Python functions from their docstrings: PyTorrent, CodeSearchNet or CoSQA",
        params=PyTorrentParams,
        build=_pytorrent,
        version=2,
    )
    yield DatasetSpec(
        name="codeforces",
        summary="Competitive programming: reasoning traces (sft) or problems with tests (rl)",
        params=CodeforcesParams,
        build=_codeforces,
        version=2,
    )
    yield DatasetSpec(
        name="io-problems",
        summary="Generated programs of a few lines with tests, in three levels, split by template",
        params=IOProblemsParams,
        build=_io_problems,
    )
    yield DatasetSpec(
        name="mbpp",
        summary="MBPP, or rows like it: small Python functions and assertions about them",
        params=MbppParams,
        build=_mbpp,
    )
