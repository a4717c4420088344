from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from kdkit.api import DataError, Dataset, DatasetLoader, Ref
from kdkit.testing.conformance import DatasetConformance
from kdkit.testing.fakes import FakeBuildContext

from kdkit_acme import plugin

(SPEC,) = plugin.kdkit_datasets()
GOOD = '{"question": "What is 6 times 7?", "answer": "42", "topic": "sums"}\n'


def build(**params: Any) -> DatasetLoader:
    loader: DatasetLoader = SPEC.build(SPEC.params(**params))
    return loader


class TestDataset(DatasetConformance):
    rows: ClassVar[Literal["messages", "prompt-completion", "prompt-only"]] = SPEC.rows

    def build(self) -> DatasetLoader:
        return build()

    def build_on(self, path: Path) -> DatasetLoader:
        return build(source=Ref(Dataset, str(path)))


def test_a_row_becomes_an_example(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(GOOD + "\n" + GOOD)
    rows = build(source=Ref(Dataset, str(file))).load(FakeBuildContext())
    (example,) = rows.examples
    assert (example.completion, example.category) == ("42", "sums")
    assert rows.counts == {"read": 2, "duplicate": 1}


def test_max_rows_takes_the_first() -> None:
    loader = build(max_rows=3)
    assert loader.load(FakeBuildContext()).examples == loader.sample().examples[:3]


@pytest.mark.parametrize("line", ['{"question": "?"}', '{"question": "?", "answer": 42}', "[]"])
def test_a_bad_row_is_named_with_its_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(GOOD + line)
    with pytest.raises(DataError) as error:
        build(source=Ref(Dataset, str(file))).load(FakeBuildContext())
    assert error.value.where == f"{file}:2"
