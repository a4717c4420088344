"""What a report says in words: how to read its numbers, and what they do not say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from kdkit.report import ALPHA
from kdkit.report.entries import SAME, Report, bare, by_dataset, marks_of, metrics_of, quantization

__all__ = ["baselines_line", "decoding_lines", "direction_line", "legend", "limits"]

_SAMPLING_ONLY: Final = ("temperature", "top_p", "top_k", "num_samples")
_FEW: Final = 50
"""Examples from which the intervals of skewed scores hold what they promise, within 2 % (simulated)."""
_RARE: Final = 10
"""Passes or failures from which a 95 % interval of pass or fail holds the truth 91 times in 100 or more (computed)."""
_BASELINES: Final = {
    "identity": "identity echoes the input",
    "empty": "empty says nothing",
    "majority": "majority gives the most common reference to every prompt",
    "reference": "reference gives the first reference, the most that metrics which compare with references can give",
}
_CAVEATS: Final = {
    "rouge-l": "ROUGE-L counts shared words, not correctness; where answers resemble prompts, copying scores high.",
    "exact-match": "Exact match gives no credit to a right answer in other words.",
    "perplexity": "Perplexity compares only models with the same tokenizer, and says nothing about generated answers.",
    "teacher-kl": "Closeness to the teacher is not quality: it rewards the teacher's mistakes as well.",
}


def baselines_line(report: Report) -> str:
    """What the baselines are; empty without any."""
    texts = [text for name, text in _BASELINES.items() if report.get("baselines", {}).get(name, {}).get("metrics")]
    return f"Baselines: {'; '.join(texts)}." if texts else ""


def direction_line(report: Report) -> str:
    """Which metrics are better high, which low, and which neither."""
    datasets = {key: dataset for dataset, keys in by_dataset(report).items() for key in keys}
    parts = []
    for words, wanted in (("Higher is better", True), ("Lower is better", False), ("Neither is better", None)):
        keys = [key for key, first in metrics_of(report).items() if first["higher_is_better"] is wanted]
        names = dict.fromkeys(bare(key, datasets[key]) for key in keys)
        if names:
            parts.append(f"{words}: {', '.join(names)}.")
    return " ".join(parts)


def legend(report: Report) -> str:
    """How to read a score."""
    text = "± is the longer arm of the 95 % interval over examples: bootstrap, or exact where all scores are 0 or 100."
    if any(True for _ in marks_of(report)):
        text += (
            f" (+) better, (-) worse than {report['roles']['reference']}, (=) {SAME}"
            f" (paired permutation test, p <= {ALPHA} after Holm's correction)."
        )
    return text


def decoding_lines(report: Report) -> list[str]:
    """The decoding of each dataset as ``name = value``, without settings that greedy decoding ignores."""
    lines = []
    for dataset, settings in report["decoding"].items():
        idle = _SAMPLING_ONLY if settings.get("do_sample") is False else ()
        texts = [f"{key} = {_setting(value)}" for key, value in settings.items() if key not in idle]
        if texts:
            lines.append(f"{dataset}: {', '.join(texts)}")
    return lines


def limits(report: Report) -> list[str]:
    """What the numbers do not say."""
    once = f"Every model was trained once (seed {report['seed']})"
    unseen = "the spread between training seeds, which can be as large as the differences shown"
    lines = [f"{once}: the intervals cover the choice of test examples, not {unseen}."]
    lines.append("Trained tokens are those of kdkit's own stages; what a model saw before is not counted.")
    lines += _sampling_limits(report)
    if any(e["ci95"] and e["n"] < _FEW for m in report["models"].values() for e in m["metrics"].values()):
        lines.append(
            f"Intervals from fewer than {_FEW} examples tend to be too narrow: from 20 examples of skewed scores, a 95 "
            "% interval holds the truth about 90 times in 100."
        )
    if any(_is_rare(entry) for model in report["models"].values() for entry in model["metrics"].values()):
        lines.append(
            "Where few answers pass, or few fail, intervals of pass or fail tend to be too narrow: with 3 to "
            f"{_RARE} to be expected, a 95 % interval holds the truth between 85 and 97 times in 100."
        )
    if report["pairs"]:
        chance = f"one in 20 falls below {ALPHA} where no model differs"
        removed = 'the verdict "not after correction" marks those that Holm\'s correction per metric removes'
        lines.append(f"p is not corrected for the {len(report['pairs'])} comparisons here: {chance}; {removed}.")
        lines.append('"No significant difference" is not "equal": the interval says how large it may be.')
    names = {key.rpartition("/")[2] for key in metrics_of(report)}
    if any(quantization(model) for model in report["models"].values()):
        lines.append(
            "Quantised models were dequantised and ran as ordinary ones: their speed and memory are not those of an "
            "integer kernel; bytes on disk are their own."
        )
    return lines + [
        text for about, text in _CAVEATS.items() if any(name == about or name.startswith(f"{about}-") for name in names)
    ]


def _is_rare(entry: Mapping[str, Any]) -> bool:
    """Whether a score of 0 to 100 is so near an end that few examples can have moved it; not at the end itself."""
    if entry["unit"] != "0-100" or entry["value"] is None or not entry["ci95"]:
        return False
    return bool(0 < min(entry["value"], 100 - entry["value"]) * entry["n"] / 100 < _RARE)


def _sampling_limits(report: Report) -> Iterator[str]:
    """One line where answers were sampled: what of it the intervals cover."""
    sampled = [s for m in report["models"].values() for s in m["decoding"].values() if s.get("do_sample")]
    if any(settings.get("num_samples", 1) == 1 for settings in sampled):
        yield "Answers were sampled once; another draw gives other scores, and no score averages over draws."
    elif sampled:
        counts = sorted({settings["num_samples"] for settings in sampled})
        yield (
            f"Answers were sampled {' or '.join(map(str, counts))} times per prompt; a prompt's answers count as one "
            "example, and perplexity and distances to the teacher are measured once per prompt."
        )


def _setting(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
