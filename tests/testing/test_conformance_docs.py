from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"


def test_the_examples_of_the_page_pass(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for number, code in enumerate(examples):
        (tmp_path / f"test_mine_{number}.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d\d passed", done.stdout, re.MULTILINE), done.stdout


def test_every_suite_and_every_fixture_is_on_the_page():
    from kdkit.testing import conformance, plugin

    text = PAGE.read_text(encoding="utf-8")
    source = Path(plugin.__file__).read_text(encoding="utf-8")
    fixtures = re.findall(r"@pytest\.fixture.*\ndef (\w+)", source)
    assert len(fixtures) == 8
    assert [name for name in (*conformance.__all__, *fixtures) if f"`{name}`" not in text] == []
