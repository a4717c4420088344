"""Rows for tests: short, made up, no two alike."""

from __future__ import annotations

from kdkit.api.data import Example

__all__ = ["tiny_rows"]


def tiny_rows(count: int = 16) -> tuple[Example, ...]:
    """Sums and echoes with their answers, in turns; the texts have letters beyond ASCII and several lines."""
    return tuple(_sum(index) if index % 2 else _echo(index) for index in range(count))


def _sum(index: int) -> Example:
    answer = str(index + 2 * index)
    return Example(
        id=f"sum-{index}",
        prompt=f"What is {index} + {2 * index}?",
        completion=answer,
        references=(answer, f"{answer}.0"),
        category="sum",
        extra={"terms": [index, 2 * index]},
    )


def _echo(index: int) -> Example:
    text = f"naïve café № {index}\nsecond line"
    return Example(id=f"echo-{index}", prompt=f"Repeat:\n{text}", completion=text, category="echo", echo=text)
