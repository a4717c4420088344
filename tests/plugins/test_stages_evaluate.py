from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kdkit
from kdkit.api import Completion, Example, Message
from kdkit.plugins.stages.baselines import baseline_predictions
from kdkit.plugins.stages.decoding import answer_seed
from kdkit.testing.tiny import save_tiny_model, tiny_model, tiny_tokenizer

PLUGINS = Path(__file__).with_name("evaluate_plugins.py")
ROWS = [{"prompt": f"{i} + {i}?", "completion": "Even." if i % 3 else f"It is {2 * i}."} for i in range(8)]
SAMPLED = {"do_sample": True, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tiny_model(root / "teacher", layers=3, seed=1)
    save_tiny_model(root / "student", layers=2, seed=2)
    return root


@pytest.fixture
def stage(models: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """An evaluate stage over both models that asks for nothing but ``values``."""

    def make(**values: Any) -> dict[str, Any]:
        base = {
            "kind": "evaluate",
            "models": {name: str(models / name) for name in ("student", "teacher")},
            "data": {"use": "jsonl", "source": "./rows.jsonl", "split": "all"},
            "sampling": {"max_new_tokens": 6},
            "precision": "fp32",
        }
        return {**base, **values}

    return make


def teacher(models: Path, tmp_path: Path, use: str = "noted") -> dict[str, Any]:
    return {"use": use, "model": str(models / "teacher"), "log": str(tmp_path / "log")}


def recipe(tmp_path: Path, stages: dict[str, Any]) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"kdkit": 1, "name": "test", "plugins": [str(PLUGINS)], "stages": stages}))
    return file


def evaluate(tmp_path: Path, stage: dict[str, Any]) -> Path:
    """The scores directory of the stage."""
    result = kdkit.run(recipe(tmp_path, {"eval": stage}), inline=True, out=tmp_path / "runs")
    assert result.ok, result.error
    return result.stage("eval").outputs["scores"].path


def scores(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "scores.json").read_text())


def predictions(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "predictions" / f"{name}--jsonl.jsonl").read_text().splitlines()]


def problems(tmp_path: Path, stage: dict[str, Any]) -> str:
    return " | ".join(f"{p.path}: {p.message}" for p in kdkit.validate(recipe(tmp_path, {"eval": stage})))


# --- order of the work ------------------------------------------------------------------------------------------------


def test_no_model_decodes_while_the_teacher_is_loaded(stage, models, tmp_path):
    metrics = [{"use": "rouge-l"}, {"use": "teacher-kl"}, {"use": "exposed"}]
    noted = {"use": "noted", "log": str(tmp_path / "log")}
    evaluate(tmp_path, stage(metrics=metrics, teacher=teacher(models, tmp_path), rollout=noted))
    events = (tmp_path / "log").read_text().split("\n")[:-1]
    assert events == [
        "teacher loaded",  # for its vocabulary: a wrong one is found before any model answers
        "teacher closed",
        "decoding",
        "decoding",
        "teacher loaded",
        "teacher answers",
        "teacher closed",
    ]


def test_without_answers_the_teacher_is_loaded_once_and_nothing_is_timed(stage, models, tmp_path):
    metrics = [{"use": "perplexity"}, {"use": "teacher-kl"}]
    found = scores(evaluate(tmp_path, stage(metrics=metrics, teacher=teacher(models, tmp_path))))
    assert (tmp_path / "log").read_text().split() == ["teacher", "loaded", "teacher", "closed"]
    student = found["models"]["student"]
    assert set(student["speed"].values()) == {None}
    assert student["parameters"] > 0
    assert student["counts"]["jsonl"] == {"n": 8, "answers": 0, "truncated": 0, "empty": 0, "unjudged": 0}
    assert found["baselines"] == {}
    assert found["models"]["teacher"]["results"]["jsonl"]["teacher-kl"]["value"] == pytest.approx(0, abs=1e-6)


def test_a_model_that_does_not_answer_has_no_speed_and_no_memory(stage, tmp_path):
    student = scores(evaluate(tmp_path, stage(metrics=[{"use": "perplexity"}])))["models"]["student"]
    assert {"generated_tokens_per_s", "prefill_tokens_per_s", "load_seconds"} < student["speed"].keys()
    assert set(student["speed"].values()) == {None}
    assert student["results"]["jsonl"]["perplexity"]["n"] == 8


def test_a_teacher_does_not_change_perplexity_or_answers(stage, models, tmp_path):
    metrics = [{"use": "rouge-l"}, {"use": "perplexity"}]
    alone = scores(evaluate(tmp_path, stage(metrics=metrics)))
    metrics.append({"use": "teacher-kl"})
    beside = scores(evaluate(tmp_path, stage(metrics=metrics, teacher=teacher(models, tmp_path))))
    for name in ("student", "teacher"):
        one, other = (found["models"][name]["results"]["jsonl"] for found in (alone, beside))
        assert one["perplexity"]["value"] == pytest.approx(other["perplexity"]["value"], rel=1e-12)
        assert one["rouge-l"] == other["rouge-l"]


def test_another_vocabulary_is_found_before_any_model_answers(stage, models, tmp_path, tmp_path_factory):
    from transformers import AutoTokenizer

    other = save_tiny_model(tmp_path_factory.mktemp("other"), seed=3, vocab=260)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    asked = stage(
        models={"student": str(models / "student"), "other": str(other)},
        metrics=[{"use": "rouge-l"}, {"use": "teacher-kl"}],
        teacher=teacher(models, tmp_path),
        rollout={"use": "noted", "log": str(tmp_path / "log")},
    )
    result = kdkit.run(recipe(tmp_path, {"eval": asked}), inline=True, out=tmp_path / "runs")
    assert result.error.exit_code == 2
    assert "vocabular" in str(result.error)
    assert "decoding" not in (tmp_path / "log").read_text()


def test_an_evaluation_stops_between_datasets(stage, models, tmp_path, monkeypatch):
    from kdkit.engine.context import Context

    monkeypatch.setattr(Context, "stopping", lambda self: True)
    asked = stage(metrics=[{"use": "rouge-l"}])
    result = kdkit.run(recipe(tmp_path, {"eval": asked}), inline=True, out=tmp_path / "runs")
    assert "stopped before student on jsonl; an evaluation starts again" in str(result.error)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_metric_appears_twice_under_the_keys_it_gives_itself(stage, tmp_path):
    asked = stage(metrics=[{"use": "words"}, {"use": "words", "n": 3}])
    found = scores(evaluate(tmp_path, asked))["models"]["student"]["results"]["jsonl"]
    assert list(found) == ["words", "words-3"]
    assert found["words-3"]["value"] == pytest.approx(found["words"]["value"] + 2)
    assert found["words"]["higher_is_better"] is None


@pytest.mark.parametrize(
    ("values", "place", "message"),
    [
        ({"metrics": [{"use": "words"}, {"use": "words"}]}, "metrics.1", "'words' appears twice as 'words' (first as"),
        ({"metrics": [{"use": "bad-key"}]}, "metrics.0", "the key 'a/b', which is not kebab-case"),
        ({"metrics": [{"use": "passed"}]}, "metrics.0", "'passed' needs 'judge'"),
        ({"metrics": [{"use": "passed", "k": 4}], "judge": {"use": "canned"}}, "metrics.0.k", "num_samples of 4"),
        ({"metrics": [{"use": "words"}], "rewards": [{"use": "canned"}, {"use": "cannd"}]}, "rewards.1", "cannd"),
        ({"metrics": [{"use": "words"}], "judge": {"use": "canned"}}, "judge", "no metric uses the judge"),
        ({"metrics": [{"use": "passed"}], "judge": {"use": "half"}}, "judge", "never gives more than 0.5"),
        ({"metrics": [{"use": "exposed"}]}, "metrics.0", "'exposed' needs 'teacher'"),
        (
            {"metrics": [{"use": "exposed", "tokens": 7}], "teacher": "noted"},
            "metrics.0.tokens",
            "7 tokens of an answer need sampling.max_new_tokens of as many, this stage has 6",
        ),
        (
            {"metrics": [{"use": "exposed"}], "teacher": "mute"},
            "teacher",
            "'mute' gives no text, which 'exposed' needs",
        ),
        ({"metrics": [{"use": "words"}], "teacher": "noted"}, "teacher", "no metric uses the teacher"),
        ({"metrics": [{"use": "words"}], "num_samples": 2}, "num_samples", "the same answer every time"),
        ({"metrics": [{"use": "words"}], "models": {"baseline-empty": "./m"}}, "models", "those of the trivial baseli"),
        (
            {
                "metrics": [{"use": "words"}],
                "models": {"a": "./m", "a--b": "./m"},
                "data": {"b--c": {"use": "jsonl", "source": "./r"}, "c": {"use": "jsonl", "source": "./r"}},
            },
            "models.a--b",
            "'a--b' on 'c' has the file name of 'a' on another dataset",
        ),
    ],
)
def test_mistakes_are_located_before_the_stage_runs(stage, models, tmp_path, values, place, message):
    if "teacher" in values:
        values = {**values, "teacher": teacher(models, tmp_path, values["teacher"])}
    found = problems(tmp_path, stage(**values))
    assert message in found
    assert f"stages.eval.{place}" in found


def test_an_evaluation_without_mistakes_has_none(stage, models, tmp_path):
    metrics = [{"use": name} for name in ("words", "passed", "exposed")]
    asked = stage(metrics=metrics, judge={"use": "canned"}, teacher=teacher(models, tmp_path))
    assert problems(tmp_path, {**asked, "num_samples": 2, "sampling": SAMPLED}) == ""


# --- several answers --------------------------------------------------------------------------------------------------


def test_several_answers_share_the_id_and_differ(stage, tmp_path):
    asked = stage(metrics=[{"use": "words"}, {"use": "perplexity"}], num_samples=3, sampling=SAMPLED)
    directory = evaluate(tmp_path, asked)
    found = scores(directory)["models"]["student"]
    rows = predictions(directory, "student")
    assert [row["sample"] for row in rows] == [0, 1, 2] * 8
    assert set(Counter(row["id"] for row in rows).values()) == {3}
    assert all(len({row["prompt"] for row in rows[i : i + 3]}) == 1 for i in range(0, 24, 3))
    assert len({row["text"] for row in rows}) > 18
    assert found["counts"]["jsonl"]["n"] == 8
    assert found["counts"]["jsonl"]["answers"] == 24
    assert found["counts"]["jsonl"]["truncated"] == sum(row["truncated"] for row in rows)
    assert found["counts"]["jsonl"]["empty"] == sum(not row["text"].strip() for row in rows)
    assert found["results"]["jsonl"]["words"]["n"] == 24
    assert found["decoding"]["num_samples"] == 3
    # One reference a row is scored once, whatever number of answers there is.
    assert found["results"]["jsonl"]["perplexity"]["n"] == 8
    assert [bool(row["measures"]) for row in rows] == [True, False, False] * 8


def test_an_answer_depends_on_its_row_and_sample_only(stage, tmp_path):
    texts = {}
    for samples, rows in ((1, 8), (2, 8), (2, 3)):
        data = {"use": "jsonl", "source": "./rows.jsonl", "split": "all", "max_rows": rows}
        asked = stage(metrics=[{"use": "words"}], num_samples=samples, sampling=SAMPLED, data=data)
        found = predictions(evaluate(tmp_path, asked), "student")
        texts[samples, rows] = {(row["id"], row["sample"]): row["text"] for row in found}
    assert texts[1, 8].items() <= texts[2, 8].items()
    assert texts[2, 3].items() <= texts[2, 8].items()


def test_seeds_of_answers_differ_and_fit():
    seeds = [answer_seed(17, f"row-{row}", sample) for row in range(50) for sample in range(4)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert answer_seed(17, "1", 2) != answer_seed(17, "2", 1)
    assert answer_seed(18, "a", 0) != answer_seed(17, "a", 0)


def test_a_report_of_sampled_answers_counts_examples(stage, tmp_path):
    stages = {
        "eval": stage(metrics=[{"use": "rouge-l"}], num_samples=3, sampling=SAMPLED),
        "report": {"kind": "report", "scores": ["${stages.eval.scores}"]},
    }
    result = kdkit.run(recipe(tmp_path, stages), inline=True, out=tmp_path / "runs")
    assert result.ok, result.error
    assert result.report["models"]["student"]["metrics"]["rouge-l"]["n"] == 8
    assert result.report["models"]["student"]["counts"]["jsonl"]["answers"] == 24
    assert result.report["decoding"]["jsonl"]["num_samples"] == 3
    assert result.report["baselines"]["reference"]["metrics"]["rouge-l"]["value"] == 100.0


# --- the judge --------------------------------------------------------------------------------------------------------


def test_a_judge_gives_verdicts(stage, tmp_path):
    asked = stage(metrics=[{"use": "passed"}], judge={"use": "canned"}, num_samples=3, sampling=SAMPLED)
    directory = evaluate(tmp_path, asked)
    for name in ("student", "teacher"):
        rows = predictions(directory, name)
        assert [row["verdict"] for row in rows] == [True, False, None, None] * 6
        entry = scores(directory)["models"][name]
        assert (entry["results"]["jsonl"]["passed"]["value"], entry["results"]["jsonl"]["passed"]["n"]) == (0.5, 12)
        assert entry["counts"]["jsonl"]["unjudged"] == 12


def test_a_judge_that_loses_answers_is_an_error(stage, tmp_path):
    asked = stage(metrics=[{"use": "passed"}], judge={"use": "canned", "answers": "short"})
    result = kdkit.run(recipe(tmp_path, {"eval": asked}), inline=True, out=tmp_path / "runs")
    assert "judge canned: 7 scores for 8 answers" in str(result.error)


def test_rewards_stand_beside_the_metrics(stage, tmp_path):
    rewards = [{"use": "canned"}, {"use": "canned", "weight": 3.0}]
    directory = evaluate(tmp_path, stage(metrics=[{"use": "words"}], rewards=rewards))
    for name in ("student", "teacher"):
        found = scores(directory)["models"][name]["results"]["jsonl"]
        assert list(found) == ["words", "reward-canned", "reward-canned-2", "reward"]
        for key, weight in {"reward-canned": 1, "reward-canned-2": 1, "reward": 4}.items():
            entry = found[key]
            assert (entry["n"], entry["higher_is_better"]) == (4, True)
            assert entry["per_example"] == pytest.approx([weight, 0.99 * weight] * 2)
            assert entry["value"] == pytest.approx(0.995 * weight)
            assert entry["counts"] == {"answers that are unscorable": 2, "answers that are infra-error": 2}
            assert entry["ids"] == [row["id"] for i, row in enumerate(predictions(directory, name)) if i % 4 < 2]


def test_a_reward_that_judges_nothing_is_undefined(stage, tmp_path):
    rewards = [{"use": "correctness", "sandbox": {"use": "unsafe-local"}}]
    directory = evaluate(tmp_path, stage(metrics=[{"use": "words"}], rewards=rewards))
    entry = scores(directory)["models"]["student"]["results"]["jsonl"]["reward-correctness"]
    assert (entry["value"], entry["n"], entry["reason"]) == (None, 0, "no tests")
    assert entry["counts"] == {"answers that are unscorable": 8}


# --- exposure ---------------------------------------------------------------------------------------------------------


def test_traces_belong_to_the_first_answer_and_vanish_for_the_teacher(stage, models, tmp_path):
    metrics = [{"use": "exposed"}, {"use": "words"}]
    asked = stage(metrics=metrics, teacher=teacher(models, tmp_path), num_samples=2, sampling=SAMPLED)
    directory = evaluate(tmp_path, asked)
    teachers = predictions(directory, "teacher")
    student = predictions(directory, "student")
    assert [bool(row["traces"]) for row in student] == [True, False] * 8
    for mine, its in zip(student[::2], teachers[::2], strict=True):
        # The teacher's answers are made once: every model is measured on the same tokens.
        assert len(mine["traces"]["teacher_answer_kl"]) == len(its["traces"]["teacher_answer_kl"])
        assert 1 <= len(mine["traces"]["own_kl"]) <= 6
        assert len(mine["traces"]["own_kl"]) == 6 or not mine["truncated"]
        assert max(map(abs, its["traces"]["own_kl"] + its["traces"]["teacher_answer_kl"])) < 1e-6
        assert min(mine["traces"]["own_kl"] + mine["traces"]["teacher_answer_kl"]) > 1e-4
    assert scores(directory)["models"]["student"]["results"]["jsonl"]["exposed"]["n"] == 8
    # The first answer is the same without the second one, and so is its trace.
    once = predictions(evaluate(tmp_path, {**asked, "num_samples": 1}), "student")
    for mine, alone in zip(student[::2], once, strict=True):
        assert mine["traces"]["own_kl"] == pytest.approx(alone["traces"]["own_kl"], rel=1e-4)


def test_the_reverse_divergence_on_own_answers(stage, models, tmp_path):
    asked = stage(metrics=[{"use": "student-kl"}], teacher=teacher(models, tmp_path), num_samples=2, sampling=SAMPLED)
    directory = evaluate(tmp_path, asked)
    student = predictions(directory, "student")
    assert [set(row["traces"]) for row in student] == [{"own_reverse_kl"}, set()] * 8
    assert all(1 <= len(row["traces"]["own_reverse_kl"]) <= 6 for row in student[::2])
    every = [value for row in student for trace in row["traces"].values() for value in trace]
    result = scores(directory)["models"]
    assert result["student"]["results"]["jsonl"]["student-kl"]["value"] == pytest.approx(sum(every) / len(every))
    assert result["teacher"]["results"]["jsonl"]["student-kl"]["value"] < 1e-6
    both = evaluate(tmp_path, {**asked, "metrics": [{"use": "student-kl"}, {"use": "exposed"}]})
    names = {"own_reverse_kl", "own_kl", "teacher_answer_kl"}
    assert set(predictions(both, "student")[0]["traces"]) == names


class WithinReach:
    """A teacher for :class:`Forcing`, without an engine."""

    def __init__(self, model):
        from kdkit.models.load import vocabulary
        from kdkit.train.objective import valid_hidden

        self.vocabulary = vocabulary(tiny_tokenizer(), model)
        self._model, self._hidden = model, valid_hidden
        self.widest = 0

    def signals(self, batch):
        from kdkit.api import Dense

        hidden, outer = self._hidden(self._model.model, batch), self

        class Blocks:
            def block(self, start, stop):
                outer.widest = max(outer.widest, stop - start)
                return Dense(outer._model.lm_head(hidden[start:stop]))

        return Blocks()


class Asked:
    """What :class:`Forcing` reads of its parameters and context."""

    max_length, per_device_eval_batch_size = 2048, 3

    def log(self, message):
        raise AssertionError(message)


@pytest.mark.parametrize("block", [None, 16], ids=["one-block", "many-blocks"])
def test_exposure_equals_brute_force_in_float64(monkeypatch, block):
    from kdkit.models.chat import ChatEncoder
    from kdkit.plugins.stages.forced import Forcing
    from kdkit.plugins.stages.subjects import Subject

    if block:
        monkeypatch.setattr("kdkit.train.scoring.block_tokens", lambda vocabulary: block)
    # The model's head is wider than the teacher's: only the shared entries are compared.
    model, tutor = tiny_model(vocab=264, seed=2), tiny_model(layers=3, seed=1)
    encoder = ChatEncoder(tiny_tokenizer())
    rows = [Example(id=str(i), prompt="abc"[: i % 3 + 1] * 4) for i in range(7)]
    own = [Completion("", tuple(range(40 + i, 45 + 2 * i)), truncated=i % 2 == 0) for i in range(7)]
    theirs = [Completion("", tuple(range(90, 90 + i)), truncated=False) for i in range(7)]
    reach = WithinReach(tutor)
    forcing = Forcing(Subject("s", None, model, tiny_tokenizer(), encoder), Asked(), Asked(), reach)
    got = forcing.exposure(reach, rows, own, theirs)
    model, tutor = model.double(), tutor.double()
    for i, row in enumerate(rows):
        for name, answer in (("own_kl", own[i]), ("teacher_answer_kl", theirs[i])):
            prompt = encoder.prompt(row)
            ids = torch.tensor([[*prompt, *answer.token_ids]])
            with torch.no_grad():
                p, q = (torch.log_softmax(m(input_ids=ids).logits[0, :, :259], -1) for m in (tutor, model))
            kl = (p.exp() * (p - q)).sum(-1)[len(prompt) - 1 :]
            # One value per generated token from the first on; the last place predicts the end token, if there was one.
            expected = kl[:-1] if answer.truncated else kl
            assert got[row.id][name] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
            assert len(got[row.id][name]) == len(answer.token_ids) + (not answer.truncated)
    assert reach.widest <= (block or math.inf)


def test_an_answer_without_a_token_has_no_trace():
    from kdkit.models.chat import ChatEncoder
    from kdkit.plugins.stages.forced import Forcing
    from kdkit.plugins.stages.subjects import Subject

    model = tiny_model()
    reach = WithinReach(model)
    forcing = Forcing(
        Subject("s", None, model, tiny_tokenizer(), ChatEncoder(tiny_tokenizer())), Asked(), Asked(), reach
    )
    answers = [Completion("", (), truncated=True), Completion("", (5, 6), truncated=True)]
    got = forcing.exposure(reach, [Example(id=name, prompt="x") for name in "ab"], answers, answers)
    assert got["a"]["own_kl"] == ()
    assert got["b"]["own_kl"] == pytest.approx((0.0, 0.0), abs=1e-6)


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def forcing():
    """A :class:`Forcing` over models with few positions, and the lines it logs."""
    from kdkit.models.chat import ChatEncoder
    from kdkit.plugins.stages.forced import Forcing
    from kdkit.plugins.stages.subjects import Subject

    def make(own: int, theirs: int | None, max_length: int = 2048, *, table: bool = False):
        model, tutor = tiny_model(seed=2), tiny_model(layers=3, seed=1)
        if table:
            model = gpt2(own)
        model.config.max_position_embeddings = own
        reach, asked = WithinReach(tutor), Asked()
        reach.positions = theirs
        asked.max_length, asked.lines = max_length, []
        asked.log = asked.lines.append
        subject = Subject("small", None, model, tiny_tokenizer(), ChatEncoder(tiny_tokenizer()))
        return Forcing(subject, asked, asked, reach), reach, asked.lines, subject.encoder

    return make


def gpt2(positions: int):
    """A model that fails where its table of positions ends."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=259, n_positions=positions, n_embd=32, n_layer=1, n_head=4, bos_token_id=256,
                        eos_token_id=258)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def row_of(encoder, name: str, length: int) -> Example:
    """An example that is ``length`` tokens long, prompt and reference together."""
    empty = len(encoder.training(Example(id="x", prompt="p", completion="a")).ids) - 1
    return Example(id=name, prompt="p", completion="a" * (length - empty), references=("a" * (length - empty),))


@pytest.mark.parametrize(
    ("own", "theirs", "max_length", "limit", "name"),
    [
        (60, None, 2048, 60, "the 60 positions of small"),
        (200, 70, 2048, 70, "the 70 positions of the teacher"),
        (60, 70, 2048, 60, "the 60 positions of small"),
        (90, 90, 50, 50, "max_length=50"),
        (50, 50, 50, 50, "max_length=50"),
    ],
)
def test_rows_beyond_the_positions_have_no_perplexity_and_are_counted(forcing, own, theirs, max_length, limit, name):
    made, _, lines, encoder = forcing(own, theirs, max_length)
    rows = [row_of(encoder, f"{length - limit:+}", length) for length in (limit - 1, limit, limit + 1, limit + 30)]
    assert [len(encoder.training(row).ids) for row in rows] == [limit - 1, limit, limit + 1, limit + 30]
    assert set(made.references("d", rows)) == {"-1", "+0"}
    assert lines == [f"d: 2 rows over {name} have no perplexity"]


def test_a_table_of_positions_is_never_read_beyond_its_end(forcing):
    made, _, lines, encoder = forcing(64, None, table=True)
    scores = made.references("d", [row_of(encoder, "fits", 64), row_of(encoder, "long", 65)])
    assert list(scores) == ["fits"]
    rows = [Example(id="r", prompt="p")]
    traces = made.own(made._teacher, rows, [Completion("", tuple(range(40, 140)), truncated=True)])
    assert len(traces["r"]["own_reverse_kl"]) == 64 - len(encoder.prompt(rows[0]))
    assert lines[1:] == ["1 answer measured only up to the 64 positions of small"]


def test_a_trace_that_ends_at_the_last_position_is_the_start_of_the_whole_one(forcing):
    rows = [Example(id=name, prompt=name * 3) for name in "abc"]
    answers = [Completion("", tuple(range(30, 30 + count)), truncated=False) for count in (5, 40, 90)]
    whole, reach, silent, encoder = forcing(2048, None)
    all_of_it = whole.exposure(reach, rows, answers, answers)
    assert silent == []
    limit = len(encoder.prompt(rows[0])) + 41  # the second answer fits with its end token, the third does not
    made, reach, lines, _ = forcing(2048, limit)
    cut = made.exposure(reach, rows, answers, answers)
    assert [len(cut[name]["own_kl"]) for name in "abc"] == [6, 41, 41]
    for name in "abc":
        for key, trace in cut[name].items():
            assert trace == pytest.approx(all_of_it[name][key][: len(trace)], rel=1e-4, abs=1e-6)
    assert lines == [f"1 answer measured only up to the {limit} positions of the teacher"] * 2


def test_a_prompt_beyond_the_positions_has_an_empty_trace(forcing):
    made, reach, lines, _ = forcing(20, None)
    got = made.own(reach, [Example(id="r", prompt="p" * 60)], [Completion("", (5, 6), truncated=True)])
    assert got == {"r": {"own_reverse_kl": ()}}
    assert len(lines) == 1


# --- baselines --------------------------------------------------------------------------------------------------------


def answers(rows: list[Example]) -> dict[str, list[str]]:
    return {name: [p.text for p in found] for name, found in baseline_predictions(rows).items()}


def test_identity_echoes_the_rows_echo_or_the_last_thing_the_user_said():
    turns = (Message("system", "s"), Message("user", "first"), Message("assistant", "a"), Message("user", "last"))
    rows = [
        Example(id="1", prompt=turns, completion="x", echo="buggy code"),
        Example(id="2", prompt=turns, completion="y"),
        Example(id="3", prompt="raw text", completion="z"),
        Example(id="4", prompt=(Message("system", "only"),), completion="z"),
    ]
    assert answers(rows)["identity"] == ["buggy code", "last", "raw text", ""]
    assert answers(rows)["empty"] == [""] * 4
    assert answers(rows)["reference"] == ["x", "y", "z", "z"]
    assert answers(rows)["majority"] == ["z"] * 4


def test_majority_is_the_most_common_first_reference_if_one_occurs_twice():
    rows = [Example(id=str(i), prompt="p", references=refs) for i, refs in enumerate([("a", "b"), ("c",), ("b", "c")])]
    assert "majority" not in answers(rows)
    assert answers([*rows, Example(id="9", prompt="p", references=("c", "b"))])["majority"] == ["c"] * 4


def test_baselines_are_scored_where_only_the_text_counts(stage, models, tmp_path):
    metrics = [{"use": "exact-match"}, {"use": "perplexity"}, {"use": "passed"}]
    directory = evaluate(tmp_path, stage(metrics=metrics, judge={"use": "canned"}))
    found = scores(directory)["baselines"]
    assert list(found) == ["identity", "empty", "majority", "reference"]
    values = {name: entry["results"]["jsonl"]["exact-match"]["value"] for name, entry in found.items()}
    assert values == {"identity": 0.0, "empty": 0.0, "majority": 100 * 5 / 8, "reference": 100.0}
    assert all(set(entry["results"]["jsonl"]) == {"exact-match"} for entry in found.values())
    student = scores(directory)["models"]["student"]["results"]["jsonl"]["exact-match"]
    assert set(found["identity"]["results"]["jsonl"]["exact-match"]) == set(student)
    assert found["identity"]["results"]["jsonl"]["exact-match"]["ids"] == student["ids"]
    echoes = predictions(directory, "baseline-identity")
    assert [row["text"] for row in echoes] == [row["prompt"] for row in predictions(directory, "student")]


def test_baselines_can_be_turned_off(stage, tmp_path):
    directory = evaluate(tmp_path, stage(metrics=[{"use": "exact-match"}], baselines=False))
    assert scores(directory)["baselines"] == {}
    assert sorted(file.name for file in (directory / "predictions").iterdir()) == [
        "student--jsonl.jsonl",
        "teacher--jsonl.jsonl",
    ]
