from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdkit.api import ConformanceError, Dataset, EnvironmentUnmet, Model, StageError
from kdkit.api.artifacts import Scores
from kdkit.engine.hashing import HashMemo
from kdkit.engine.manifest import Manifest, describe_artifact, output_digest
from kdkit.engine.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    store.prepare()
    return store


def draft(entry, outputs):
    kind, _, key = entry.name.partition("-")
    return Manifest(
        kind=kind, key=key, recipe="r", stage="s", seed=1, created="2026-01-01", seconds=1.0, outputs=outputs, files={}
    )


def fill(store, entry, text="hello"):
    partial, _ = store.open_partial(entry, {}, fresh=False)
    (partial / "data.jsonl").write_text(text)
    (partial / "checkpoints" / "step-000001").mkdir()
    (partial / "checkpoints" / "step-000001" / "state").write_text("x")
    (partial / "stage.log").write_text("log")
    return partial


def published(store, text="hello", key="abc"):
    entry = store.entry("count", key)
    partial = fill(store, entry, text)
    outputs = {"data": describe_artifact(Dataset(path=partial / "data.jsonl", info={"rows": 1}), partial)}
    return entry, store.publish(entry, draft(entry, outputs))


def test_a_published_entry_is_whole_and_has_no_checkpoints(store):
    entry, manifest = published(store)
    assert store.condition(entry).state == "whole"
    assert sorted(p.name for p in entry.iterdir()) == ["data.jsonl", "manifest.json", "stage.log"]
    assert not store.partial(entry).exists()
    assert manifest.files["data.jsonl"][0] == 5
    assert manifest.artifacts(entry)["data"] == Dataset(path=entry / "data.jsonl", info={"rows": 1})


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest", "no-manifest", "not-json"])
def test_damage_is_seen_and_named(store, damage):
    entry, _ = published(store)
    data, manifest = entry / "data.jsonl", entry / "manifest.json"
    if damage == "flip":
        data.write_bytes(b"hellp")
    elif damage == "cut":
        data.write_bytes(b"hel")
    elif damage == "gone":
        data.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"seed": 1', '"seed": 2'))
    elif damage == "no-manifest":
        manifest.unlink()
    else:
        manifest.write_text("{")
    found = Store(store.root).condition(entry)
    assert found.state == "damaged"
    name = "manifest.json" if damage in {"manifest", "no-manifest", "not-json"} else "data.jsonl"
    assert name in found.damage


def test_damage_with_a_restored_modification_time_is_seen(store, monkeypatch):
    monkeypatch.setattr(HashMemo, "SETTLED_SECONDS", -1.0)
    entry, _ = published(store)
    old = 1_700_000_000
    os.utime(entry / "data.jsonl", (old, old))
    assert store.condition(entry).state == "whole"
    time.sleep(0.05)  # more than a tick of the file system's clock
    (entry / "data.jsonl").write_bytes(b"hellp")
    os.utime(entry / "data.jsonl", (old, old))
    assert Store(store.root).condition(entry).state == "damaged"


def test_an_untouched_file_is_not_read_again(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 100)
    monkeypatch.setattr(HashMemo, "SETTLED_SECONDS", -1.0)
    memo = HashMemo(tmp_path / "memo.json")
    first = memo.sha256(file)
    memo.save()
    again = HashMemo(tmp_path / "memo.json")
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("read again"))
    assert again.sha256(file) == first


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', "{"])
def test_a_broken_memo_is_only_forgotten(tmp_path, content):
    (tmp_path / "memo.json").write_text(content)
    (tmp_path / "f").write_text("x")
    assert len(HashMemo(tmp_path / "memo.json").sha256(tmp_path / "f")) == 64


def test_a_crash_before_the_manifest_leaves_the_checkpoints(store, monkeypatch):
    entry = store.entry("count", "abc")
    partial = fill(store, entry)
    monkeypatch.setattr("kdkit.engine.store.write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(EnvironmentUnmet, match="the disk is full"):
        store.publish(entry, draft(entry, {}))
    assert not entry.exists()
    assert store.condition(entry).checkpoint == "step-000001"
    assert (partial / "data.jsonl").exists()


@pytest.mark.parametrize("step", ["rename", "discard"])
def test_a_crash_after_the_manifest_only_leaves_the_renaming(store, monkeypatch, step):
    entry = store.entry("count", "abc")
    fill(store, entry)
    target = (Path, "rename") if step == "rename" else (Store, "discard")
    with monkeypatch.context() as patch:
        patch.setattr(*target, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.publish(entry, draft(entry, {}))
    condition = store.condition(entry)
    assert condition.state == "finished"
    store.finish(entry)
    assert store.condition(entry).state == "whole"


def test_a_finished_directory_that_changed_afterwards_is_not_published(store, monkeypatch):
    entry = store.entry("count", "abc")
    partial = fill(store, entry)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.publish(entry, draft(entry, {}))
    (partial / "data.jsonl").write_text("other")
    assert store.condition(entry).state == "absent"


def test_working_again_withdraws_an_earlier_manifest(store, monkeypatch):
    entry = store.entry("count", "abc")
    partial = fill(store, entry)
    with monkeypatch.context() as patch:
        patch.setattr("kdkit.engine.store.shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.publish(entry, draft(entry, {}))
    assert (partial / "manifest.json").exists()
    _, resumed = store.open_partial(entry, {}, fresh=False)
    assert resumed
    assert not (partial / "manifest.json").exists()


def test_publishing_replaces_an_older_entry(store):
    entry, _ = published(store, "old")
    published(store, "new!")
    assert (entry / "data.jsonl").read_text() == "new!"
    assert store.condition(entry).state == "whole"
    assert [p.name for p in (store.root / ".trash").iterdir()] == []


def test_checkpoints_from_other_inputs_are_thrown_away(store):
    entry = store.entry("count", "abc")
    partial, resumed = store.open_partial(entry, {"k/data": "1"}, fresh=False)
    assert not resumed
    (partial / "checkpoints" / "step-000001").mkdir()
    assert store.open_partial(entry, {"k/data": "1"}, fresh=False)[1]
    assert not store.open_partial(entry, {"k/data": "2"}, fresh=False)[1]
    assert list((partial / "checkpoints").glob("step-*")) == []


def test_fresh_throws_checkpoints_away(store):
    entry = store.entry("count", "abc")
    partial = fill(store, entry)
    assert not store.open_partial(entry, {}, fresh=True)[1]
    assert not (partial / "data.jsonl").exists()


def test_temporary_files_are_no_checkpoints(store):
    entry = store.entry("count", "abc")
    partial, _ = store.open_partial(entry, {}, fresh=False)
    (partial / "checkpoints" / ".tmp-step-000001").mkdir()
    assert store.condition(entry).checkpoint == ""
    assert not store.open_partial(entry, {}, fresh=False)[1]


def test_links_are_refused(store):
    entry = store.entry("count", "abc")
    partial = fill(store, entry)
    (partial / "link").symlink_to("/etc/hostname")
    with pytest.raises(ConformanceError, match="link"):
        store.publish(entry, draft(entry, {}))


def test_private_files_become_readable_by_umask(store):
    before = os.umask(0o022)
    try:
        entry = store.entry("count", "abc")
        partial = fill(store, entry)
        (partial / "data.jsonl").chmod(0o600)
        store.publish(entry, draft(entry, {}))
    finally:
        os.umask(before)
    assert stat.S_IMODE((entry / "data.jsonl").stat().st_mode) == 0o644


def test_a_lock_refuses_a_second_process_and_ends_with_the_first(store):
    entry = store.entry("count", "abc")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom kdkit.engine.store import Store\n"
        f"store = Store(Path({str(store.root)!r}))\nlock = store.lock(store.entry('count', 'abc'))\n"
        "print('held', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(EnvironmentUnmet, match=rf"another run works on it \(pid {other.pid} on "):
            store.lock(entry)
        other.kill()
    store.lock(entry).close()


def test_artifact_fields_survive_the_manifest(tmp_path):
    (tmp_path / "m").mkdir()
    model = Model(path=tmp_path / "m", format="gptq", keep_layers=(0, 2), name="x", info={"bits": 4})
    entry = json.loads(json.dumps(describe_artifact(model, tmp_path)))
    manifest = draft(tmp_path / "count-abc", {"model": entry})
    assert manifest.artifacts(tmp_path)["model"] == model


def test_cards_do_not_change_a_models_digest():
    files = {"model/w.safetensors": (1, "a"), "model/README.md": (1, "b"), "other": (1, "c")}
    renamed = {**files, "model/README.md": (1, "z"), "other": (1, "z")}
    output = {"type": "model", "path": "model"}
    assert output_digest(output, files) == output_digest(output, renamed)
    assert output_digest(output, files) != output_digest(output, {**files, "model/w.safetensors": (1, "z")})
    scores = {"type": Scores.type_name, "path": "model"}
    assert output_digest(scores, files) != output_digest(scores, renamed)


def test_manifests_of_another_format_are_refused(store):
    entry, _ = published(store)
    data = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**data, "format": 99}))
    with pytest.raises(StageError, match="another version"):
        Manifest.read(entry)


def test_an_unwritable_store_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentUnmet, match=r"file/store: cannot be written: .*no directory; set KDKIT_STORE"):
        Store(tmp_path / "file" / "store").prepare()
