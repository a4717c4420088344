from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from made_up_scores import scores


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a scores.json and gives its directory."""

    def do(models: Mapping[str, Mapping[str, Any]], name: str = "scores", **changes: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "scores.json").write_text(json.dumps(scores(models) | changes))
        return directory

    return do
