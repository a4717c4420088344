from __future__ import annotations

import json
import sys

import pytest
import yaml

from kdkit.api import KdkitError, PluginError, RecipeError
from kdkit.cli.plugins import list_plugins, show_plugin

REWARD = """
from pydantic import Field
from kdkit.api import *

class P(Params):
    target_tokens: int = Field(ge=1)
    '''Length that scores best.'''
    scale: float = Field(1.0, gt=0, le=2)
    '''How fast the score falls with the distance from the target, in a sentence that takes more than a line.'''

class Clip:
    def __init__(self, params, ctx): ...

@hookimpl
def kdkit_rewards():
    yield RewardSpec(name="brevity", summary="Short answers", params=P, build=Clip, range=(0.0, 1.0), version=3)
"""


@pytest.fixture(autouse=True)
def no_built_ins(monkeypatch):
    monkeypatch.setenv("KDKIT_DISABLE_PLUGINS", "kdkit")
    monkeypatch.delenv("KDKIT_STRICT_PLUGINS", raising=False)


@pytest.fixture
def plugins(install, loss_module):
    root = install("kdkit-acme", {"cmd_acme": loss_module(), "cmd_reward": REWARD}, version="0.3")
    install("kdkit-b", {"cmd_b": loss_module()})
    install("kdkit-bad", {"cmd_bad": "def deep():\n    raise OSError('no\\ndisk')\ndeep()"})
    return root


def test_list(plugins, capsys):
    assert list_plugins(json=False, kind=None) == 0
    lines = capsys.readouterr().out.splitlines()
    mark = "(ambiguous: 'focal' alone is refused)"
    assert lines[:5] == [
        "KIND    NAME              FROM            SUMMARY",
        f"loss    kdkit-acme/focal  kdkit-acme 0.3  {mark} A loss",
        f"loss    kdkit-b/focal     kdkit-b 1.0     {mark} A loss",
        "reward  brevity           kdkit-acme 0.3  Short answers",
        "broken: kdkit-bad 1.0 (cmd_bad): OSError: no disk (kdkit plugins show kdkit-bad)",
    ]
    assert lines[5].startswith("disabled: kdkit/")


def test_list_of_one_kind(plugins, capsys):
    assert list_plugins(json=False, kind="reward") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][:3] == ["KIND", "reward", "broken:"]


def test_list_of_a_kind_that_does_not_exist(plugins):
    with pytest.raises(RecipeError, match="no component kind 'rewards'"):
        list_plugins(json=False, kind="rewards")


def test_list_as_json(plugins, capsys):
    assert list_plugins(json=True, kind=None) == 0
    data = json.loads(capsys.readouterr().out)
    assert [(c["qualified_name"], c["ambiguous"]) for c in data["components"]] == [
        ("kdkit-acme/focal", True),
        ("kdkit-b/focal", True),
        ("kdkit-acme/brevity", False),
    ]
    assert data["components"][2] == {
        "kind": "reward",
        "name": "brevity",
        "qualified_name": "kdkit-acme/brevity",
        "dist": "kdkit-acme",
        "version": "0.3",
        "built_in": False,
        "ambiguous": False,
        "summary": "Short answers",
    }
    (broken,) = data["broken"]
    assert (broken["dist"], broken["error"], broken["kinds"]) == ("kdkit-bad", "OSError: no disk", None)
    assert all(name.startswith("kdkit/") for name in data["disabled"])


@pytest.mark.parametrize("arguments", [("reward", "brevity"), ("brevity", None), ("kdkit-acme/brevity", None)])
def test_show(arguments, plugins, capsys):
    assert show_plugin(*arguments, json=False) == 0
    assert (
        capsys.readouterr().out
        == f"""\
reward brevity
  Short answers
  from     kdkit-acme 0.3
  version  3
  source   {plugins / "cmd_reward.py"}:12
  range    0.0, 1.0

  PARAMETER      TYPE   DEFAULT   CONSTRAINT
  target_tokens  int    required  >= 1
      Length that scores best.
  scale          float  1.0       > 0, <= 2
      How fast the score falls with the distance from the target, in a sentence
      that takes more than a line.

  rewards:
    - use: brevity
      target_tokens: 1
      # scale: 1.0

"""
    )


def test_show_as_json(plugins, capsys):
    assert show_plugin("reward", "brevity", json=True) == 0
    (shown,) = json.loads(capsys.readouterr().out)["components"]
    assert shown["declares"] == {"range": [0.0, 1.0]}
    assert shown["spec_version"] == 3
    assert shown["params"][1]["name"] == "scale"
    assert shown["params"][1]["constraint"] == "> 0, <= 2"
    assert yaml.safe_load(shown["snippet"]) == {"rewards": [{"use": "brevity", "target_tokens": 1}]}


def test_show_a_distribution(plugins, capsys):
    assert show_plugin("KDKit_Acme", None, json=False) == 0
    out = capsys.readouterr().out
    assert "loss kdkit-acme/focal\n" in out
    assert "reward brevity\n" in out


def test_show_every_component_of_a_name(plugins, capsys):
    assert show_plugin("focal", None, json=True) == 0
    data = json.loads(capsys.readouterr().out)
    assert [c["dist"] for c in data["components"]] == ["kdkit-acme", "kdkit-b"]


def test_show_a_broken_distribution(plugins, capsys):
    assert show_plugin("kdkit-bad", None, json=False) == 3
    out = capsys.readouterr().out
    assert out.startswith("broken: kdkit-bad 1.0 (cmd_bad): OSError: no disk\n")
    assert "in deep" in out
    assert show_plugin("kdkit-bad", None, json=True) == 3
    assert json.loads(capsys.readouterr().out)["broken"][0]["entry_point"] == "cmd_bad"


def test_show_what_is_ambiguous(plugins):
    with pytest.raises(RecipeError, match="write kdkit-acme/focal or kdkit-b/focal"):
        show_plugin("loss", "focal", json=False)


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("kdkit-acne", PluginError, "did you mean 'kdkit-acme'?; kdkit-bad 1.0"),
        ("reward", RecipeError, "'reward' is a component kind; name a component too: kdkit plugins show reward NAME"),
    ],
)
def test_show_what_does_not_exist(name, error, text, plugins):
    with pytest.raises(KdkitError) as info:
        show_plugin(name, None, json=False)
    assert type(info.value) is error
    assert text in str(info.value)


def test_show_what_does_not_exist_when_nothing_is_broken(install, loss_module):
    install("kdkit-acme", {"cmd_acme": loss_module()})
    with pytest.raises(RecipeError, match=r"no component or plugin 'zzz'; see kdkit plugins list"):
        show_plugin("zzz", None, json=False)


def test_a_terminal_wraps_between_words_and_keeps_columns(install, loss_module, capsys, monkeypatch):
    summary = "word " * 15 + "end"
    install("kdkit-acme", {"cmd_acme": loss_module().replace("A loss", summary)})
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert list_plugins(json=False, kind=None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 60 for line in lines[:4])
    start = lines[0].replace("\x1b[1m", "").index("SUMMARY")
    assert lines[2].startswith(" " * start + "word")


@pytest.mark.parametrize(("no_color", "coloured"), [("1", False), (None, True)])
def test_colour(no_color, coloured, plugins, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    list_plugins(json=False, kind="reward")
    assert ("\x1b[31m" in capsys.readouterr().out) is coloured


def test_a_pipe_gets_plain_text_and_whole_lines(install, loss_module, capsys, monkeypatch):
    summary = "word " * 15 + "end"
    install("kdkit-acme", {"cmd_acme": loss_module().replace("A loss", summary)})
    monkeypatch.setenv("COLUMNS", "40")
    list_plugins(json=False, kind=None)
    out = capsys.readouterr().out
    assert f"  {summary}\n" in out
    assert "\x1b" not in out


def test_brackets_in_a_summary_are_text(install, loss_module, capsys):
    install("kdkit-acme", {"cmd_acme": loss_module().replace("A loss", "[N] values [bold]x[/bold] :smile:")})
    list_plugins(json=False, kind=None)
    assert "[N] values [bold]x[/bold] :smile:" in capsys.readouterr().out
