"""Does a dataset give the same typed rows every time, and refuse what it cannot read in one line?

Subclass :class:`DatasetConformance` in a test file and run pytest:

    class TestLimericks(DatasetConformance):
        def build(self):
            return build_limericks(LimerickParams())

        def build_on(self, path):
            return build_limericks(LimerickParams(source=Ref(Dataset, str(path))))
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import pytest

from kdkit.api.data import Example, Message, Rows
from kdkit.api.errors import KdkitError
from kdkit.api.protocols import DatasetLoader
from kdkit.testing.conformance.checks import json_value, one_line, refused, unchanged
from kdkit.testing.fakes import FakeBuildContext
from kdkit.testing.network import network_refused

__all__ = ["DatasetConformance", "hostile_files"]

_ROLES: Final = frozenset({"system", "user", "assistant", "tool"})


def hostile_files() -> dict[str, bytes]:
    """Contents that are no rows, by what they are."""
    row = b'{"prompt": "p", "completion": "c"}\n'
    return {
        "an empty file": b"",
        "white space": b"\n \n\t\n",
        "random bytes": random.Random(17).randbytes(4096),  # noqa: S311 - bytes for tests
        "a row cut in the middle": row[:12],
        "text that is no JSON": b"this is no JSON\nnor is this\n",
        "a number": b"42\n",
        "deep nesting": b"[" * 20_000 + b"]" * 20_000,
        "another encoding": '{"prompt": "é"}\n'.encode("utf-16"),
        "bytes that are no UTF-8": b'{"prompt": "\xff\xfe"}\n',
        "half of a surrogate pair": b'{"prompt": "\\ud83d", "completion": "\\ud83d"}\n',
        "NUL characters": b"\x00" * 4096,
        "columns of nobody": b'{"\x1b[2J": 1}\n' * 3,
        "a gzip head": b"\x1f\x8b\x08\x00" + bytes(20),
    }


class DatasetConformance:
    """What every dataset must fulfil.

    Attributes:
        rows: What the spec declares.
        downloads: ``load`` of what ``build`` returns needs the network, which there is none of in tests: it has to be
            refused in one line.
        suffix: Of the files that ``build_on`` gets.
    """

    rows: ClassVar[Literal["messages", "prompt-completion", "prompt-only"]] = "prompt-completion"
    downloads: ClassVar[bool] = False
    suffix: ClassVar[str] = ".jsonl"

    def build(self) -> DatasetLoader:
        """The loader; it can load here and now, from files of the plugin or of the test, unless ``downloads``."""
        raise NotImplementedError

    def build_on(self, path: Path) -> DatasetLoader | None:
        """A loader of the file ``path``, which may be no file of rows at all; None for datasets that read no file."""
        del path
        return None

    # -- helpers

    def _load(self, seed: int = 0) -> Rows:
        return self.build().load(FakeBuildContext(seed=seed))

    def _all(self) -> list[tuple[str, Rows]]:
        found = [("sample", self.build().sample())]
        return found if self.downloads else [*found, ("load", self._load())]

    def _on(self, path: Path) -> DatasetLoader:
        loader = self.build_on(path)
        if loader is None:
            pytest.skip("it reads no file")
        return loader

    def _typed(self, rows: Rows, what: str) -> None:
        assert isinstance(rows, Rows), f"{what}: {type(rows).__name__} is no Rows"
        assert isinstance(rows.examples, Sequence), f"{what}: examples are no sequence, which can be read again"
        for reason, number in rows.counts.items():
            assert isinstance(reason, str), f"{what}: a count is called {reason!r}"
            assert isinstance(number, int), f"{what}: the count {reason!r} is {number!r}"
            assert number >= 0, f"{what}: the count {reason!r} is {number}"
        for index, example in enumerate(rows.examples):
            _check_example(example, f"{what}: row {index}")
            _check_form(example, self.rows, f"{what}: row {index} ({example.id})")

    # -- the contract

    def test_the_sample_has_eight_rows_and_needs_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No files of the current directory or of the person's home, and no network."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        with network_refused():
            rows = self.build().sample()
        assert len(rows.examples) >= 8, f"the sample has {len(rows.examples)} rows; give eight or more"

    def test_the_sample_is_always_the_same(self) -> None:
        loader = self.build()
        random.seed(3)
        first = list(loader.sample().examples)
        random.seed(4)
        assert list(loader.sample().examples) == first, "a second call gives another sample"
        assert list(self.build().sample().examples) == first, "another instance gives another sample"

    def test_rows_are_typed(self) -> None:
        for what, rows in self._all():
            self._typed(rows, what)

    def test_ids_are_unique(self) -> None:
        for what, rows in self._all():
            seen: set[str] = set()
            for example in rows.examples:
                assert example.id not in seen, f"{what}: two rows have the id {example.id!r}"
                seen.add(example.id)

    def test_loading_depends_on_the_seed_alone(self) -> None:
        """Neither on earlier calls nor on the generators of Python and numpy, which stay as they are."""
        if self.downloads:
            pytest.skip("it downloads")
        loader = self.build()
        random.seed(4)
        first = list(loader.load(FakeBuildContext(seed=3)).examples)
        random.seed(5)
        before = random.getstate()
        again = list(loader.load(FakeBuildContext(seed=3)).examples)
        assert random.getstate() == before, "loading uses the generator of the module random"
        assert again == first, "a second load with the same seed gives other rows"
        loader.load(FakeBuildContext(seed=4))
        assert list(self._load(seed=3).examples) == first, "another instance gives other rows for the same seed"

    def test_an_id_names_the_same_row_whatever_the_seed(self) -> None:
        """Splits, caches and paired statistics go by it."""
        if self.downloads:
            pytest.skip("it downloads")
        named = {example.id: example for example in self._load(seed=1).examples}
        for example in self._load(seed=2).examples:
            other = named.get(example.id, example)
            assert (other.prompt, other.completion) == (example.prompt, example.completion), (
                f"the id {example.id!r} names another row with another seed"
            )

    def test_loading_stays_offline(self) -> None:
        """What cannot be loaded without the network is refused in one line."""
        with network_refused():
            if self.downloads:
                with refused("a dataset that is not here"):
                    self._load()
            else:
                self._load()

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / f"absent{self.suffix}"
        loader = self._on(path)
        with refused("a missing file"):
            _ = len(loader.load(FakeBuildContext()).examples)

    def test_no_file_makes_it_raise_anything_else(self, tmp_path: Path) -> None:
        """Whatever is in a file, it is refused in one line, or its rows are rows."""
        for what, content in hostile_files().items():
            path = tmp_path / f"hostile{self.suffix}"
            path.write_bytes(content)
            try:
                rows = self._on(path).load(FakeBuildContext())
                found = list(rows.examples)
            except KdkitError as error:
                one_line(error, what)
            else:
                self._typed(Rows(examples=found, counts=rows.counts), what)

    def test_files_stay_as_they_are(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It writes neither beside its source nor into the current directory."""
        monkeypatch.chdir(tmp_path)
        path = tmp_path / f"rows{self.suffix}"
        path.write_bytes(hostile_files()["text that is no JSON"])
        loaders = [self.build_on(path), None if self.downloads else self.build()]
        with unchanged(tmp_path, "loading"):
            for loader in filter(None, loaders):
                try:
                    loader.load(FakeBuildContext())
                except KdkitError:
                    continue


def _check_example(example: Any, where: str) -> None:
    assert isinstance(example, Example), f"{where} is a {type(example).__name__}, not an Example"
    assert isinstance(example.id, str), f"{where}: its id is {example.id!r}"
    assert example.id, f"{where} has no id"
    turns = example.prompt if isinstance(example.prompt, tuple) else (Message("user", example.prompt),)
    assert turns, f"{where}: a prompt without messages"
    for turn in turns:
        assert isinstance(turn, Message), f"{where}: a prompt is a text or a tuple of Message, not {turn!r}"
        assert turn.role in _ROLES, f"{where}: there is no role {turn.role!r}"
    texts = [example.id, example.category, example.echo, *(turn.content for turn in turns), *example.references]
    texts += [] if example.completion is None else [example.completion]
    assert isinstance(example.references, tuple), f"{where}: references are a tuple of texts"
    for text in texts:
        assert isinstance(text, str), f"{where}: {text!r} is no text"
        assert text.isascii() or _encodes(text), f"{where}: {text[:60]!r} holds half of a character"
    assert isinstance(example.extra, Mapping), f"{where}: extra is {example.extra!r}"
    for name, value in example.extra.items():
        assert isinstance(name, str), f"{where}: a column is called {name!r}"
        assert json_value(value), f"{where}: column {name!r} holds no JSON value: {value!r}"


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_form(example: Example, rows: str, where: str) -> None:
    if rows == "prompt-only":
        assert example.completion is None, f"{where} has an answer; the spec says prompt-only"
        return
    assert example.completion is not None, f"{where} has no answer; the spec says {rows}"
    if rows == "messages":
        assert isinstance(example.prompt, tuple), f"{where}: the prompt is a text; the spec says messages"
