from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from kdkit.api.errors import EnvironmentUnmet, ModelError
from kdkit.models import locate as module
from kdkit.models.catalogue import KNOWN, models_dir
from kdkit.models.hub import MODEL_FILES
from kdkit.models.locate import locate

NAME = "smollm2-135m-instruct"
HUB_ID = KNOWN[NAME].hub_id


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("form", ["./m", "../base/m", "absolute", "~/m"])
def test_a_path_is_relative_to_the_recipe(form, tmp_path, hollow, monkeypatch):
    base = tmp_path / "base"
    hollow(base / "m")
    monkeypatch.setenv("HOME", str(base))
    literal = str(base / "m") if form == "absolute" else form
    assert locate(literal, base_dir=base, offline=True) == (base / "m").resolve()


def test_the_directory_itself_is_a_path(tmp_path, hollow):
    assert locate(".", base_dir=hollow(tmp_path / "m"), offline=True) == (tmp_path / "m").resolve()


@pytest.mark.parametrize(
    ("without", "says"),
    [("config.json", "config.json"), ("tokenizer.json", "tokenizer"), ("model.safetensors", "safetensors")],
)
def test_an_incomplete_directory_says_what_is_missing(without, says, tmp_path, hollow):
    hollow(tmp_path / "m", without=without)
    with pytest.raises(ModelError, match=f"no .*{says}") as caught:
        locate("./m", base_dir=tmp_path, offline=True)
    assert "./m" in one_line(caught)
    assert str(tmp_path) in one_line(caught)


def test_each_kind_of_tokenizer_file_is_enough(tmp_path, hollow):
    for name in ("tokenizer.model", "vocab.json"):
        path = hollow(tmp_path / name, without="tokenizer.json")
        (path / name).write_text("{}")
        assert locate(f"./{name}", base_dir=tmp_path, offline=True) == path.resolve()


def test_pickled_weights_are_named_as_the_reason(tmp_path, hollow):
    (hollow(tmp_path / "m", without="model.safetensors") / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled weights"):
        locate("./m", base_dir=tmp_path, offline=True)


def test_a_missing_shard_is_found(tmp_path, hollow):
    path = hollow(tmp_path / "m", without="model.safetensors")
    for shard in ("a.safetensors", "b.safetensors"):
        (path / shard).write_bytes(b"x")
    index = {"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert locate("./m", base_dir=tmp_path, offline=True)
    (path / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no b\.safetensors \(1 of 2"):
        locate("./m", base_dir=tmp_path, offline=True)


def test_a_missing_directory_and_a_file(tmp_path):
    with pytest.raises(ModelError, match="no such directory"):
        locate("./nowhere", base_dir=tmp_path, offline=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        locate("./file", base_dir=tmp_path, offline=True)


def test_a_known_name_that_was_not_pulled_says_how(tmp_path):
    with pytest.raises(EnvironmentUnmet) as caught:
        locate(NAME, base_dir=tmp_path, offline=True)
    assert f"run: kdkit models pull {NAME}" in one_line(caught)


def test_a_known_name_that_was_pulled(tmp_path, hollow):
    hollow(models_dir() / NAME)
    assert locate(NAME, base_dir=tmp_path, offline=True) == models_dir() / NAME


@pytest.mark.parametrize("typo", ["smollm2-135m", "smolm2-135m-instruct", "SmolLM2-135M-Instruct"])
def test_an_unknown_name_suggests_the_nearest(typo, tmp_path):
    with pytest.raises(ModelError) as caught:
        locate(typo, base_dir=tmp_path, offline=True)
    assert f"did you mean {NAME}?" in one_line(caught)


def test_an_unknown_name_that_is_a_directory_suggests_the_path(tmp_path, hollow):
    hollow(tmp_path / "mine")
    with pytest.raises(ModelError, match=r"write \./mine"):
        locate("mine", base_dir=tmp_path, offline=True)


@pytest.mark.parametrize("literal", ["", "a/b/c", "org/", "gpt5"])
def test_other_words_are_refused_with_the_forms(literal, tmp_path):
    with pytest.raises(ModelError, match=r"allowed: \./path.*org/name"):
        locate(literal, base_dir=tmp_path, offline=True)


@pytest.mark.parametrize("literal", ["./m", NAME])
def test_a_revision_belongs_to_hub_ids(literal, tmp_path, hollow):
    hollow(tmp_path / "m")
    hollow(models_dir() / NAME)
    with pytest.raises(ModelError, match="revision"):
        locate(literal, base_dir=tmp_path, revision="main", offline=True)


def cached_on_hub(repo: str, root: Path, hollow) -> Path:
    """A Hub cache that holds ``repo``."""
    folder = root / ("models--" + repo.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return hollow(folder / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("way", ["offline", "HF_HUB_OFFLINE"])
def test_a_hub_id_offline_comes_from_the_cache(way, tmp_path, hollow, monkeypatch):
    found = cached_on_hub("org/name", tmp_path / "hub", hollow)
    if way != "offline":
        monkeypatch.setenv(way, "1")
    assert locate("org/name", base_dir=tmp_path, offline=way == "offline") == found


@pytest.mark.parametrize(("flag", "variable"), [(False, "1"), (True, "0"), (False, "0")])
def test_offline_is_the_flag_or_the_variable(flag, variable, tmp_path, hollow, monkeypatch):
    asked: list[bool] = []
    monkeypatch.setattr(module, "snapshot", lambda *_, cache_only, **__: asked.append(cache_only) or hollow())
    monkeypatch.setenv("HF_HUB_OFFLINE", variable)
    locate("org/name", base_dir=tmp_path, offline=flag)
    assert asked == [flag or variable == "1"]


def test_a_hub_id_offline_and_not_cached(tmp_path):
    with pytest.raises(EnvironmentUnmet, match="not in the Hub cache and offline") as caught:
        locate("org/name", base_dir=tmp_path, offline=True)
    assert "org/name" in one_line(caught)


def test_the_hub_id_of_a_known_model_offline_says_pull(tmp_path):
    with pytest.raises(EnvironmentUnmet, match=f"kdkit models pull {NAME}"):
        locate(HUB_ID, base_dir=tmp_path, offline=True)


@pytest.mark.parametrize("offline", [True, False])
def test_the_pulled_copy_stands_in_for_the_hub_id(offline, tmp_path, hollow):
    hollow(models_dir() / NAME)
    assert locate(HUB_ID, base_dir=tmp_path, offline=offline) == models_dir() / NAME
    assert locate(HUB_ID.lower(), base_dir=tmp_path, offline=offline) == models_dir() / NAME


def test_the_hub_cache_goes_before_the_pulled_copy(tmp_path, hollow):
    hollow(models_dir() / NAME)
    found = cached_on_hub(HUB_ID, tmp_path / "hub", hollow)
    assert locate(HUB_ID, base_dir=tmp_path, offline=True) == found


def test_the_pulled_copy_is_no_particular_revision(tmp_path, hollow):
    hollow(models_dir() / NAME)
    with pytest.raises(EnvironmentUnmet) as caught:
        locate(HUB_ID, base_dir=tmp_path, revision="v1", offline=True)
    assert type(caught.value) is EnvironmentUnmet  # known by name to whoever gets it from a worker process
    assert "kdkit models pull" not in str(caught.value)


def test_fingerprint_is_of_the_content(tmp_path, hollow):
    first, second = hollow(tmp_path / "a"), hollow(tmp_path / "b")
    same = module.fingerprint(first)
    assert module.fingerprint(second) == same
    assert len(same) == 64
    for name in ("README.md", "kdkit.json", "trainer_state.json"):
        (second / name).write_text("else")
    assert module.fingerprint(second) == same
    seen = {same}
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json", "model.safetensors"):
        (second / name).write_text("else")
        seen.add(module.fingerprint(second))
    assert len(seen) == 5
    (first / "tokenizer.json").rename(first / "vocab.json")
    assert module.fingerprint(first) not in seen


def test_fingerprint_of_nothing(tmp_path):
    with pytest.raises(ModelError, match="no model files"):
        module.fingerprint(tmp_path)


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files whose content was read for a hash."""
    names: list[str] = []
    real = module.hashlib.file_digest

    def digest(stream, name):
        names.append(Path(stream.name).name)
        return real(stream, name)

    monkeypatch.setattr(module.hashlib, "file_digest", digest)
    return names


def age(path: Path, seconds: float) -> None:
    for file in path.iterdir():
        stat = file.stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns - int(seconds * 1e9)))


def test_the_second_fingerprint_reads_no_weights(tmp_path, hollow, hashed):
    path = hollow(tmp_path / "m")
    age(path, 60)
    first = module.fingerprint(path)
    assert sorted(hashed) == ["config.json", "model.safetensors", "tokenizer.json"]
    hashed.clear()
    assert module.fingerprint(path) == first
    assert hashed == []
    (path / "model.safetensors").write_bytes(b"weighty")  # as long as before
    age(path, 30)
    assert module.fingerprint(path) != first
    assert "model.safetensors" in hashed


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, hollow, hashed):
    path = hollow(tmp_path / "m")
    module.fingerprint(path)
    hashed.clear()
    module.fingerprint(path)
    assert len(hashed) == 3


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}'])
def test_a_broken_memory_is_ignored(content, tmp_path, hollow):
    path = hollow(tmp_path / "m")
    age(path, 60)
    want = module.fingerprint(path)
    memory = tmp_path / "xdg" / "kdkit" / "hashes.json"
    memory.write_text(content)
    assert module.fingerprint(path) == want
    assert len(json.loads(memory.read_text())) >= 3
    assert [file.name for file in memory.parent.iterdir()] == ["hashes.json"]


def test_an_unwritable_memory_is_tolerated(tmp_path, hollow, monkeypatch):
    path = hollow(tmp_path / "m")
    age(path, 60)
    want = module.fingerprint(path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert module.fingerprint(path) == want


def test_the_memory_forgets_files_that_are_gone(tmp_path, hollow):
    for name in ("a", "b"):
        path = hollow(tmp_path / name)
        age(path, 60)
        module.fingerprint(path)
        shutil.rmtree(tmp_path / name)
    age(hollow(tmp_path / "c"), 60)
    module.fingerprint(tmp_path / "c")
    entries = json.loads((tmp_path / "xdg" / "kdkit" / "hashes.json").read_text())
    assert {Path(name).parent.name for name in entries} == {"c"}


def test_no_pickle_is_ever_fetched():
    assert not [pattern for pattern in MODEL_FILES if pattern.endswith((".bin", ".pt", ".pth", ".pkl", "*"))]
