from __future__ import annotations

import json

import datasets
import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from kdkit.api import DataError, EnvironmentUnmet
from kdkit.plugins.datasets.dolly import DollyLoader
from kdkit.plugins.datasets.jsonl import JsonlLoader
from kdkit.plugins.datasets.plugin import DollyParams, JsonlParams


@pytest.fixture
def hub(monkeypatch):
    """What ``datasets.load_dataset`` was called with; it answers with one row, or raises ``hub.error``."""

    class Hub:
        calls: list = []  # noqa: RUF012
        error: Exception | None = None

    hub = Hub()
    hub.calls = []

    def load_dataset(path, name=None, **kwargs):
        hub.calls.append((path, name, kwargs, datasets.config.HF_HUB_OFFLINE))
        if hub.error:
            raise hub.error
        rows = [{"instruction": "¿Qué?", "context": None, "response": "Eso.", "category": "open_qa", "id": 4}]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


def load(ctx, **given):
    return DollyLoader(DollyParams.model_validate_json(json.dumps({"split": "all", **given}))).load(ctx)


@pytest.mark.parametrize(
    ("given", "called"),
    [
        ({}, ("databricks/databricks-dolly-15k", None, "train", None)),
        ({"language": "es"}, ("argilla/databricks-dolly-15k-curated-multilingual", None, "es", None)),
        (
            {"source": "argilla/databricks-dolly-15k-curated-multilingual", "hub_split": "en"},
            ("argilla/databricks-dolly-15k-curated-multilingual", None, "en", None),
        ),
        (
            {"source": "a/b", "config": "c", "hub_split": "dev", "revision": "main~1"},
            ("a/b", "c", "dev", "main~1"),
        ),
    ],
)
def test_what_is_asked_of_the_hub(hub, load_context, given, called):
    (example,) = load(load_context, **given).examples
    assert example.completion == "Eso."
    ((path, name, kwargs, _),) = hub.calls
    assert (path, name, kwargs) == (
        f"hf://datasets/{called[0]}",
        called[1],
        {"split": called[2], "revision": called[3]},
    )


@pytest.mark.parametrize("offline", [True, False])
def test_offline_reaches_the_library_and_only_for_this_call(hub, load_context, monkeypatch, offline):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    load_context.offline = offline
    load(load_context)
    assert hub.calls[0][3] is offline
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist"), DataError, "a/b: no such dataset on the Hub, or it is"),
        (
            ConnectionError("Couldn't reach"),
            EnvironmentUnmet,
            "a/b: not in the Hub cache, and the Hub cannot be reached",
        ),
        (FileNotFoundError("no file"), EnvironmentUnmet, "a/b: not in the Hub cache, and the Hub cannot be reached"),
        (ValueError("Unknown split\n'dev'."), DataError, "a/b: cannot be loaded: Unknown split 'dev'."),
        (DatasetGenerationError("An error"), DataError, "a/b: cannot be loaded: An error"),
        (RuntimeError("Dataset scripts are no longer supported"), DataError, "a/b: cannot be loaded: Dataset scripts"),
    ],
)
def test_errors_of_the_hub_are_one_line(hub, load_context, raised, kind, text):
    hub.error = raised
    load_context.offline = False
    with pytest.raises(kind) as error:
        load(load_context, source="a/b")
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)


def test_broken_hub_rows_are_numbered(hub, load_context):
    params = JsonlParams.model_validate_json('{"source": "a/b"}')
    with pytest.raises(DataError, match=r"^a/b:1: has neither 'messages' nor 'prompt'"):
        JsonlLoader(params).load(load_context)


def test_the_real_library_says_so_when_it_is_offline(load_context, tmp_path, monkeypatch):
    # A directory of that name in the working directory must not be taken for the Hub's dataset.
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "x.jsonl").write_text(json.dumps({"instruction": "a", "response": "b"}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EnvironmentUnmet) as error:
        load(load_context, source="org/name")
    assert error.value.exit_code == 4
    assert str(error.value) == (
        "org/name: not in the Hub cache, and offline; name a local file (./path), or connect once so that it is "
        "downloaded"
    )
