"""Every built-in component runs the conformance suite of its kind, or there is a reason why it cannot."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from kdkit.host import Catalog

TESTS = Path(__file__).parents[1]
SUITES = (
    ("loss", "TokenLossConformance", "testing/test_conformance_losses.py", {
        "cross-entropy": "CrossEntropy", "forward-kl": "ForwardKL", "reverse-kl": "ReverseKL", "jsd": "JSD",
        "skew-kl": "SkewKL", "skew-reverse-kl": "SkewReverseKL", "adaptive-kl": "AdaptiveKL", "tvd": "TotalVariation",
    }),
    ("loss", "PolicyLossConformance", "testing/test_policy_conformance_losses.py", {
        "minillm": "MiniLLM", "on-policy-reverse-kl": "OnPolicyReverseKL", "grpo": "GRPO",
    }),
    ("reward", "RewardConformance", "testing/test_conformance_rewards.py", {
        "think": "Think", "steps": "Steps", "length": "Length", "repetition": "Repetition", "language": "Language",
        "correctness": "Correctness", "rouge": "Rouge", "teacher-logprob": "TeacherLogprob",
    }),
    ("dataset", "DatasetConformance", "testing/test_conformance_datasets.py", {
        "dolly": "Dolly", "jsonl": "Jsonl", "instructions": "Instructions", "bugnet": "BugNet", "mbpp": "Mbpp",
        "pytorrent": "PyTorrent", "codeforces": "Codeforces", "io-problems": "IOProblems",
    }),
    ("teacher", "TeacherConformance", "testing/test_conformance_teachers.py", {"local": "Local", "cache": "Cache"}),
    ("teacher", "TeacherConformance", "serve/test_serve_conformance.py", {"openai": "OpenAI"}),
    ("quantizer", "QuantizerConformance", "plugins/test_quantizers_rtn.py", {"rtn": "Symmetric"}),
    ("quantizer", "QuantizerConformance", "plugins/test_quantizer_gptq.py", {"gptq": "Gptq"}),
    ("quantizer", "QuantizerConformance", "plugins/test_quantizers_gguf.py", {"gguf": "Q8"}),
    ("metric", "MetricConformance", "testing/test_conformance_metrics.py", {
        "rouge-l": "RougeL", "chrf": "ChrF", "exact-match": "ExactMatch", "code-exact": "CodeExact",
        "parse-rate": "ParseRate", "pass-at-k": "PassAtK", "distinct-n": "DistinctN", "length": "Length",
        "perplexity": "Perplexity", "teacher-kl": "TeacherKL", "student-kl": "StudentKL",
        "exposure-bias": "ExposureBias", "hf-evaluate": "HfEvaluateOfTheCorpus",
    }),
    ("stage", "StageConformance", "testing/test_conformance_stages.py", {
        "sft": "Sft", "distill": "Distill", "grpo": "Grpo", "minillm": "MiniLLM", "cache-teacher": "CacheTeacher",
        "generate": "Generate", "evaluate": "Evaluate", "report": "Report", "quantize": "Quantize",
        "dequantize": "Dequantize", "lm-eval": "LmEval",
    }),
    ("rollout", "RolloutConformance", "testing/test_conformance_rollouts.py", {"transformers": "Transformers"}),
    ("tracker", "TrackerConformance", "testing/test_conformance_trackers.py", {
        "jsonl": "Jsonl", "tensorboard": "Tensorboard",
    }),
    ("sandbox", "SandboxConformance", "testing/test_conformance_sandboxes.py", {
        "bubblewrap": "Bubblewrap", "landlock": "Landlock",
    }),
)  # fmt: skip
"""Kind, suite, test file, and the class there for each component, without its ``Test``."""
WITHOUT = {
    "loss uld": "an aligned loss: these have no suite; see train/test_aligned.py",
    "loss hidden-mse": "a representation loss: these have no suite; see train/test_representation.py",
    "loss hidden-cosine": "a representation loss: these have no suite; see train/test_representation.py",
    "sandbox auto": "one of the others, whichever works",
    "sandbox unsafe-local": "it isolates nothing, and says so",
}
LISTED = [(kind, name, base, file, f"Test{suite}") for kind, base, file, of in SUITES for name, suite in of.items()]


def test_every_built_in_component_is_listed():
    known = defaultdict(set)
    for kind, name, *_ in LISTED:
        known[kind].add(name)
    for words in WITHOUT:
        kind, name = words.split()
        assert name not in known[kind]
        known[kind].add(name)
    found = defaultdict(set)
    for entry in Catalog.discover(disable=["*"]).entries():
        found[entry.kind].add(entry.name)
    assert known == found


@cache
def bases(file: Path) -> dict[str, list[str]]:
    """Classes of a test file, and the names of their bases."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def derives(name: str, base: str, classes: dict[str, list[str]]) -> bool:
    return name == base or any(derives(other, base, classes) for other in classes.get(name, ()))


@pytest.mark.parametrize(("kind", "name", "base", "file", "suite"), LISTED)
def test_its_suite_is_there(kind, name, base, file, suite):
    assert derives(suite, base, bases(TESTS / file)), f"{kind} {name}: {suite} of {file} is no {base}"
