from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from conftest_train import make_rows

from kdkit.models.chat import Encoded
from kdkit.testing.tiny import tiny_model


@pytest.fixture
def rows() -> list[Encoded]:
    return make_rows()


@pytest.fixture
def double_model():
    return tiny_model().double().train()
