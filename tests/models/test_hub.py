from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
from huggingface_hub import errors as hub_errors

from kdkit.api.errors import EnvironmentUnmet, ModelError
from kdkit.models.hub import NotOnHubError, is_offline, snapshot


def answer(monkeypatch, error: Exception) -> list[dict[str, object]]:
    calls: list[dict[str, object]] = []

    def fake(repo, **settings):
        calls.append(settings | {"repo": repo})
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    return calls


def http_error(kind: type[Exception]) -> Exception:
    return kind("said no", response=SimpleNamespace(headers={}, status_code=404, request=None))


@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (hub_errors.LocalEntryNotFoundError("x"), NotOnHubError, "cannot be reached"),
        (hub_errors.HTTPError("timed out"), NotOnHubError, "cannot be reached"),
        (ConnectionError("reset"), NotOnHubError, "cannot be reached"),
        (http_error(hub_errors.RepositoryNotFoundError), ModelError, "no such model on the Hub"),
        (http_error(hub_errors.GatedRepoError), ModelError, "gated"),
        (http_error(hub_errors.RevisionNotFoundError), ModelError, "no revision 'v9'"),
        (http_error(hub_errors.HfHubHTTPError), NotOnHubError, "answered with an error"),
        (OSError(errno.ENOSPC, "No space left on device"), EnvironmentUnmet, "not enough room"),
        (PermissionError(errno.EACCES, "Permission denied"), EnvironmentUnmet, "cannot be written"),
    ],
)
def test_what_can_go_wrong_is_one_line(error, raised, says, monkeypatch):
    answer(monkeypatch, error)
    with pytest.raises(raised, match=says) as caught:
        snapshot("org/name", revision="v9", cache_only=False)
    assert "\n" not in str(caught.value)


def test_a_bad_id_is_refused_without_network():
    with pytest.raises(ModelError, match="no Hub id"):
        snapshot("or g/na me", revision=None, cache_only=True)


def test_only_text_and_safetensors_of_the_top_folder_are_asked_for(monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    calls = answer(monkeypatch, ConnectionError())
    with pytest.raises(NotOnHubError):
        snapshot("org/name", revision=None, cache_only=True)
    files = ["config.json", "tokenizer.json", "model.safetensors", "modeling.py", "chat_template.jinja"]
    others = ["pytorch_model.bin", "training_args.bin", "onnx/model.safetensors", "consolidated.safetensors", "x.gguf"]
    allow, ignore = calls[0]["allow_patterns"], calls[0]["ignore_patterns"]
    assert list(filter_repo_objects(files + others, allow_patterns=allow, ignore_patterns=ignore)) == files
    assert calls[0]["local_files_only"] is True


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_is_offline(value, expected, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert is_offline() is expected
