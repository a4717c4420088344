"""The pytest plugin: what it loads, and what its fixtures do, in this suite and in that of a stranger."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest

from kdkit.host import Catalog
from kdkit.testing.network import NetworkUsed, network_refused

LOSS = """
from kdkit.api import LossSpec, Params, hookimpl

class P(Params):
    gamma: float = 2.0
    "Focusing exponent."

@hookimpl
def kdkit_losses():
    yield LossSpec(name="NAME", summary="A loss", params=P, build=lambda p: None)
"""
STAGE = '''
import os
from pathlib import Path

from kdkit.api import Dataset, Params, StageSpec, hookimpl

class P(Params):
    """Writes a file."""

    text: str = "x"
    "What is in it."

def run(params, ctx):
    (ctx.out / "data.jsonl").write_text(f"{params.text} {os.getpid()}\\n")
    return {"data": Dataset(path=ctx.out / "data.jsonl")}

@hookimpl
def kdkit_stages():
    yield StageSpec(name="note", summary="Writes a file", params=P, run=run, outputs={"data": Dataset})
'''


def names(catalog: Catalog, kind: str = "loss") -> set[str]:
    return {entry.qualified_name for entry in catalog.entries(kind) if not entry.built_in}


def test_it_loads_pytest_and_the_standard_library_only():
    code = (
        "import sys, pytest; before = set(sys.modules); import kdkit.testing.plugin;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)), sorted(m for m in sys.modules if m.startswith('kdkit')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['kdkit'] ['kdkit', 'kdkit.testing', 'kdkit.testing.plugin']"


def test_suites_are_loaded_when_they_are_named():
    code = (
        "import sys; from kdkit.testing import conformance;"
        "from kdkit.testing.conformance import DatasetConformance, MetricConformance, RewardConformance;"
        "from kdkit.testing.conformance import SandboxConformance, TrackerConformance;"
        "print('torch' in sys.modules, sorted(conformance.__all__) == dir(conformance))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False True"


def test_catalog_is_what_is_installed(catalog):
    assert isinstance(catalog, Catalog)
    assert "kdkit/forward-kl" in {entry.qualified_name for entry in catalog.entries("loss")}


def test_installed_text_is_found_by_the_host(install_plugin):
    catalog = install_plugin(LOSS.replace("NAME", "mine"))
    assert names(catalog) == {"acme/mine"}
    assert names(Catalog.discover(strict=False)) == {"acme/mine"}
    assert catalog.entry("loss", "mine").version == "1.0"


def test_installing_again_replaces(install_plugin):
    install_plugin(LOSS.replace("NAME", "first"))
    assert names(install_plugin(LOSS.replace("NAME", "other"), version="2.0")) == {"acme/other"}
    assert names(install_plugin(LOSS.replace("NAME", "third"), "acme-two")) == {"acme/other", "acme-two/third"}


def test_a_package_without_init_is_installed(install_plugin):
    install_plugin({"acme_bare.plugin": LOSS.replace("NAME", "bare")}, entry_points={"it": "acme_bare.plugin"})
    assert "acme_bare" in sys.modules


def test_what_was_installed_for_a_test_is_gone_after_it(catalog):
    """The tests above left nothing."""
    assert names(catalog) == set()
    assert not [name for name in sys.modules if name.startswith("acme")]
    assert "installed" not in os.environ.get("PYTHONPATH", "")
    assert not [path for path in sys.path if "/installed" in path]


def test_a_broken_plugin_is_among_the_broken(install_plugin):
    (broken,) = install_plugin("import nothing_of_the_sort", "kdkit-acme").broken
    assert (broken.dist, broken.version) == ("kdkit-acme", "1.0")
    assert "nothing_of_the_sort" in broken.error


def test_metadata_counts(install_plugin):
    (broken,) = install_plugin(LOSS, requires=["kdkit>=99"]).broken
    assert "needs kdkit>=99" in broken.error
    catalog = install_plugin({"a": LOSS.replace("NAME", "one"), "b": "x = 1"}, "two", entry_points={"it": "a"})
    assert names(catalog) == {"two/one"}


def test_a_file_and_a_project_directory(install_plugin, tmp_path):
    file = tmp_path / "anything.py"
    file.write_text(LOSS.replace("NAME", "of-file"))
    assert names(install_plugin(file)) == {"acme/of-file"}
    package = tmp_path / "project" / "src" / "kdkit_focal"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "plugin.py").write_text(LOSS.replace("NAME", "focal"))
    (tmp_path / "project" / "pyproject.toml").write_text(
        '[project]\nname = "kdkit-focal"\nversion = "0.3"\ndependencies = ["kdkit>=0.1"]\n'
        '[project.optional-dependencies]\nfast = ["acme-c"]\n'
        '[project.entry-points."kdkit.plugins"]\nfocal = "kdkit_focal.plugin"\n'
    )
    catalog = install_plugin(tmp_path / "project")
    assert names(catalog) == {"acme/of-file", "kdkit-focal/focal"}
    assert catalog.entry("loss", "focal").version == "0.3"
    assert catalog.check_requires(["kdkit-focal[fast]"])[0].startswith("kdkit-focal[fast] is required and lacks acme-c")


def test_recipes_run_in_workers_that_see_the_plugin(install_plugin, run_recipe):
    install_plugin(STAGE)
    recipe = "kdkit: 1\nname: mine\nstages:\n  a: {kind: note}\n"
    result = run_recipe(recipe, **{"stages.a.text": "hello"})
    assert result.ok, result.error
    written = result.stage("a").outputs["data"].path.read_text().split()
    assert written[0] == "hello"
    assert written[1] != str(os.getpid())
    assert (
        run_recipe(recipe, **{"stages.a.text": "hello"}).stage("a").outputs["data"].path.read_text().split() == written
    )


def test_recipes_run_inline_and_from_mappings_and_files(install_plugin, run_recipe, tmp_path):
    install_plugin(STAGE)
    result = run_recipe({"stages": {"a": {"kind": "note"}}}, inline=True)
    assert result.stage("a").outputs["data"].path.read_text() == f"x {os.getpid()}\n"
    file = tmp_path / "r.yaml"
    file.write_text("kdkit: 1\nname: of-file\nstages: {b: {kind: acme/note, text: y}}\n")
    assert run_recipe(file, inline=True).stage("b").outputs["data"].path.read_text().startswith("y ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml"]


def test_a_tiny_model_and_its_tokenizer(tiny_model, tiny_tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "naïve café\n"
    ids = tiny_tokenizer(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tiny_model)(text)["input_ids"] == ids
    assert tiny_tokenizer.decode(ids) == text
    assert AutoModelForCausalLM.from_pretrained(tiny_model).config.vocab_size == len(tiny_tokenizer)


def test_tiny_rows_are_distinct(tiny_rows):
    assert len(tiny_rows) == 16
    assert len({row.id for row in tiny_rows}) == len({row.prompt for row in tiny_rows}) == 16
    assert {row.category for row in tiny_rows} == {"sum", "echo"}


def test_a_scripted_teacher_answers(scripted_teacher, tiny_rows):
    from kdkit.api import Message, Sampling
    from kdkit.api.data import Example

    teacher = scripted_teacher({"2+2?": "4", tiny_rows[0].prompt: "an echo"})
    chat = Example(id="c", prompt=(Message("system", "s"), Message("user", "2+2?")))
    found = teacher.generate([chat, tiny_rows[0], tiny_rows[1]], Sampling(max_new_tokens=8), 3)
    assert [c.text for c in found] == ["4", "an echo", "I do not"]
    assert [c.truncated for c in found] == [False, False, True]
    assert [len(c.token_ids) for c in found] == [2, 8, 8]
    assert teacher.asked == ["2+2?", tiny_rows[0].prompt, tiny_rows[1].prompt]


@pytest.mark.parametrize("wrong", [{"confidence": 1.0}, {"confidence": 0.0}, {"top_k": 0}, {"top_k": 259}])
def test_a_scripted_teacher_refuses(scripted_teacher, wrong):
    with pytest.raises(ValueError, match="allowed: "):
        scripted_teacher(**wrong)


# -- no network


def test_this_machine_is_within_reach(no_network):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        socket.getaddrinfo("localhost", 80)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
        here.sendto(b"x", ("127.0.0.1", 9))


def unconnected(kind, use):
    with socket.socket(socket.AF_INET, kind) as made:
        use(made)


@pytest.mark.parametrize(
    "reach",
    [
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: unconnected(socket.SOCK_STREAM, lambda s: s.connect_ex(("192.0.2.1", 80))),
        lambda: unconnected(socket.SOCK_DGRAM, lambda s: s.sendto(b"x", ("192.0.2.1", 53))),
        lambda: socket.getaddrinfo("example.org", 443),
        lambda: socket.gethostbyname("example.org"),
    ],
)
def test_another_machine_is_not_even_if_the_error_is_swallowed(reach):
    def swallowed():
        with network_refused() as tried:
            with pytest.raises(NetworkUsed):
                reach()
            assert len(tried) == 1

    with pytest.raises(NetworkUsed, match=r"192\.0\.2\.1|example\.org"):
        swallowed()


# -- in a stranger's project

STRANGER = """
import socket
from pathlib import Path

def test_reaches_out(no_network):
    try:
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    except Exception:
        pass

def test_everything_is_there(
    catalog, install_plugin, run_recipe, tiny_model, tiny_tokenizer, tiny_rows, scripted_teacher
):
    assert (tiny_model / "config.json").is_file()
"""


def test_a_stranger_has_the_fixtures_by_installing_kdkit(tmp_path):
    from importlib.metadata import entry_points

    if not entry_points(group="pytest11", name="kdkit"):
        pytest.skip("this kdkit is not installed with its pytest plugin")
    (tmp_path / "test_mine.py").write_text(STRANGER)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert re.search(r"^2 passed, 1 error", done.stdout, re.MULTILINE), done.stdout
    assert "the network was used: connect to 192.0.2.1:80" in done.stdout
