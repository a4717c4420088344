from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from kdkit.api import Example, StageSpec
from kdkit.testing.conformance import StageConformance

from kdkit_acme import plugin, stage

(SPEC,) = plugin.kdkit_stages()


class TestStage(StageConformance):
    spec: ClassVar[StageSpec[Any]] = SPEC
    # Each of these is refused before anything runs.
    wrong: ClassVar[Sequence[Mapping[str, Any]]] = ({"min_words": 9}, {"max_words": 0})

    def params(self, model: Path, rows: Path) -> dict[str, Any]:
        del model  # a directory, for stages that want one
        return {"data": {"use": "jsonl", "source": str(rows)}, "min_words": 2, "max_words": 8}


@pytest.mark.parametrize(("answer", "count"), [(None, 0), ("", 0), (" two\nwords ", 2)])
def test_words(answer: str | None, count: int) -> None:
    assert stage.words(Example(id="1", prompt="?", completion=answer)) == count
