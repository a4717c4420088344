"""Hook of the site: links to files beside docs/ lead to copies in the site, and work as they do in the repository.

A recipe or a script is shown as a page with its text. A link to a file that is not there fails the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any, Final

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

_ROOT: Final = Path(__file__).parents[2]
_PLACE: Final = "repository/"
"""Where the copies lie in the site."""
_LINK: Final = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_FENCE: Final = re.compile(r"^( *)(`{3,}).*?^\1\2`*[ ]*$", re.DOTALL | re.MULTILINE)
_LANGUAGES: Final = {".yaml": "yaml", ".py": "python", ".json": "json", ".toml": "toml", ".jsonl": "json"}


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add a page for every file of the repository that a page links to, and that those pages link to."""
    waiting = [("docs/" + file.src_uri, file.content_string) for file in files.documentation_pages()]
    while waiting:
        name, text = waiting.pop()
        for target in _outside(name, text):
            uri = _uri(target)
            if files.get_file_from_path(uri) is None:
                page = _page(name, target)
                file = File.generated(config, uri, content=page, inclusion=InclusionLevel.NOT_IN_NAV)
                files.append(file)
                waiting.append((target, page))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links out of docs/ at the copies."""
    uri = page.file.src_uri
    name = _original(uri)

    def replace(found: re.Match[str]) -> str:
        target = _target(name, found[2])
        if target.startswith("docs/") and not uri.startswith(_PLACE):
            return found[0]
        return found[1] + posixpath.relpath(_uri(target), posixpath.dirname(uri) or ".") + found[3]

    return _outside_of_fences(markdown, lambda text: _LINK.sub(replace, text))


def _outside(name: str, text: str) -> list[str]:
    """Files beside docs/ that the file ``name`` links to."""
    found: list[str] = []

    def collect(part: str) -> str:
        found.extend(_target(name, link[2]) for link in _LINK.finditer(part))
        return part

    if name.endswith(".md"):
        _outside_of_fences(text, collect)
    return [target for target in found if not target.startswith("docs/")]


def _outside_of_fences(text: str, change: Any) -> str:
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def _target(name: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def _uri(target: str) -> str:
    """Where a file of the repository lies in the site's sources."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return _PLACE + (target if target.endswith(".md") else f"{target}.md")


def _original(uri: str) -> str:
    if not uri.startswith(_PLACE):
        return "docs/" + uri
    name = uri.removeprefix(_PLACE)
    return name if (_ROOT / name).is_file() else name.removesuffix(".md")


def _page(name: str, target: str) -> str:
    file = _ROOT / target
    if target.startswith("..") or not file.is_file():
        raise PluginError(f"{name} links to {target}, which is no file of the repository")
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    return f"# {target}\n\n````{_LANGUAGES.get(file.suffix, 'text')}\n{text.rstrip()}\n````\n"
