"""From an instruction and its context to a prompt: chat messages, Alpaca headings, or a template of the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from kdkit.api.data import Message
from kdkit.api.errors import DataError, EnvironmentUnmet
from kdkit.plugins.datasets.options import PromptOptions

__all__ = ["Language", "Prompt", "Prompter", "alpaca_prompt", "prompter", "template_renderer"]

Language: TypeAlias = Literal["en", "es"]
Prompt: TypeAlias = str | tuple[Message, ...]
Prompter: TypeAlias = Callable[[str, str, str], Prompt]
"""``(instruction, context, category)`` to a prompt."""


@dataclass(frozen=True, slots=True)
class _Wording:
    """Texts of the Alpaca form in one language."""

    alone: str
    with_context: str
    instruction: str
    context: str
    response: str


_WORDING: Final[Mapping[Language, _Wording]] = {
    # The English wording of Alpaca, word for word, since published models were trained on it.
    "en": _Wording(
        "Below is an instruction that describes a task.",
        "Below is an instruction that describes a task, paired with an input that provides further context.",
        "Write a response that appropriately completes the request.\n\n### Instruction:\n",
        "\n\n### Input:\n",
        "\n\n### Response:\n",
    ),
    "es": _Wording(
        "Esta es una instrucción que plantea una tarea.",
        "Esta es una instrucción que plantea una tarea, junto con una entrada que aporta más contexto.",
        "Redacta una respuesta que la resuelva de forma adecuada.\n\n### Instrucción:\n",
        "\n\n### Entrada:\n",
        "\n\n### Respuesta:\n",
    ),
}


def alpaca_prompt(instruction: str, context: str, language: Language) -> str:
    """The text with headings that Alpaca and MiniLLM train on; the answer follows it directly."""
    words = _WORDING[language]
    intro = words.with_context if context else words.alone
    middle = words.context + context if context else ""
    return f"{intro} {words.instruction}{instruction}{middle}{words.response}"


def prompter(options: PromptOptions, language: Language) -> Prompter:
    """The function that makes prompts in the chosen style.

    Raises:
        DataError: The template is missing or wrong; the returned function raises it when rendering fails.
        EnvironmentUnmet: The template cannot be read.
    """
    if options.prompt_style == "alpaca":
        return _alpaca(language)
    if options.template is not None:
        return _template(options.template)
    return _chat(options.system)


def _chat(system: str | None) -> Prompter:
    before = (Message("system", system),) if system else ()

    def make(instruction: str, context: str, category: str) -> Prompt:
        del category
        return (*before, Message("user", f"{instruction}\n\n{context}" if context else instruction))

    return make


def _alpaca(language: Language) -> Prompter:
    def make(instruction: str, context: str, category: str) -> Prompt:
        del category
        return alpaca_prompt(instruction, context, language)

    return make


def _template(path: Path) -> Prompter:
    render = template_renderer(path, ("instruction", "context", "category"))

    def make(instruction: str, context: str, category: str) -> Prompt:
        return render({"instruction": instruction, "context": context, "category": category})

    return make


def template_renderer(path: Path, names: Sequence[str]) -> Callable[[Mapping[str, str]], str]:
    """The function that renders the Jinja file at ``path`` with a value for each of ``names``.

    Raises:
        DataError: The template is missing or wrong; the returned function raises it when rendering fails.
        EnvironmentUnmet: The template cannot be read.
    """
    from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
    from jinja2.sandbox import SandboxedEnvironment

    # The text goes to a language model, so nothing is escaped for HTML.
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    try:
        template = environment.from_string(_read(path))
    except TemplateSyntaxError as error:
        raise DataError(f"is no Jinja template: {error.message}", where=f"{path}:{error.lineno}") from error

    def render(values: Mapping[str, str]) -> str:
        try:
            prompt = template.render({name: values[name] for name in names})
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise DataError(f"cannot be rendered: {error}", where=str(path), allowed=", ".join(names)) from error
        if not prompt.strip():
            raise DataError("renders to an empty prompt", where=str(path))
        return prompt

    return render


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError("no such template", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError("the template is not UTF-8", where=str(path)) from error
    except OSError as error:
        raise EnvironmentUnmet(f"the template cannot be read: {error.strerror}", where=str(path)) from error
