from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kdkit.cli.app import main
from kdkit.models.pretrained import quiet
from kdkit.testing.tiny import save_tiny_model


@dataclass(frozen=True)
class Done:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tiny models that answer differently. Do not change them."""
    root = tmp_path_factory.mktemp("tiny")
    with quiet():
        return save_tiny_model(root / "a"), save_tiny_model(root / "b", seed=1)


@pytest.fixture
def kdkit_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Done]:
    """Runs ``kdkit ARGUMENTS`` in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["kdkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return Done(int(end.value.code or 0), printed.out, printed.err)

    return run
