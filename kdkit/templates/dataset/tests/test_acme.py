from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from kdkit.api import DataError, Dataset, DatasetLoader, Ref, Rows
from kdkit.testing.conformance import DatasetConformance
from kdkit.testing.fakes import FakeBuildContext

from kdkit_acme import plugin

(SPEC,) = plugin.kdkit_datasets()
GOOD = '{"question": "What is 6 times 7?", "answer": "42"}\n'


def load(file: Path, **params: Any) -> Rows:
    loader: DatasetLoader = SPEC.build(SPEC.params(source=Ref(Dataset, str(file)), **params))
    return loader.load(FakeBuildContext())
