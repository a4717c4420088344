"""length, rouge and teacher-logprob: hand-computed values."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError
from reward_helpers import Workshop, answer, failed, problem, rollout

from kdkit.api import ConformanceError, Example, Message, Rollout
from kdkit.api.errors import RecipeError
from kdkit.api.slots import Found
from kdkit.plugins.rewards.length import Length, cosine, overlong, window

GOOD = problem(("", "yes"))
PROGRAMS = {"good": lambda job: "yes", "down": lambda job: failed("infra-error")}


@pytest.fixture
def shop():
    return Workshop(PROGRAMS)


@pytest.mark.parametrize(
    ("tokens", "value"),
    [(0, 1.0), (25, 0.5 + 0.25 * (1 + math.sqrt(0.5))), (50, 0.75), (100, 0.5), (200, 0.5), (10**6, 0.5)],
)
def test_cosine_of_a_right_answer(shop, tokens, value):
    assert shop.value("length", answer("good"), example=GOOD, tokens=tokens, max_tokens=100) == pytest.approx(value)


def test_a_wrong_answer_earns_nothing_by_its_length(shop):
    """Neither by being short, which would make silence pay, nor by padding."""
    for text in ("", "no program", answer("bad")):
        for tokens in (0, 10, 100, 1000):
            assert shop.value("length", text, example=GOOD, tokens=tokens, max_tokens=100) == 0.0


def test_a_right_answer_is_never_below_a_wrong_one(shop):
    right = [shop.value("length", answer("good"), example=GOOD, tokens=n) for n in range(0, 3000, 100)]
    wrong = [shop.value("length", answer("bad"), example=GOOD, tokens=n) for n in range(0, 3000, 100)]
    assert min(right) > max(wrong)
    assert right == sorted(right, reverse=True)


def test_cosine_of_a_wrong_answer_on_request(shop):
    given = {"example": GOOD, "max_tokens": 100, "wrong_short": -1.0, "wrong_long": -0.5}
    assert shop.value("length", "no", tokens=0, **given) == -1.0
    assert shop.value("length", "no", tokens=50, **given) == pytest.approx(-0.75)
    assert shop.value("length", "no", tokens=500, **given) == -0.5


def test_length_has_no_opinion_on_what_cannot_be_judged(shop):
    score = shop.score("length", answer("good"), tokens=5)
    assert (score.status, score.reason) == ("unscorable", "no example")
    assert shop.score("length", answer("down"), example=GOOD, tokens=5).status == "infra-error"


def test_length_shares_the_judge_of_the_recipe(shop):
    batch = [rollout(answer("good"), example=GOOD, tokens=5)]
    shop.build("correctness")(batch)
    assert len(shop.sandbox.jobs) == 1
    length = shop.build("length")
    length(batch)
    shop.build("length", correctness={"use": "correctness", "scoring": "partial"})(batch)
    assert len(shop.sandbox.jobs) == 1
    length.close()
    assert shop.sandbox.closed == 1


def test_partly_right_is_not_right(shop):
    half = problem(("", "yes"), ("x", "no"))
    nested = {"use": "correctness", "scoring": "partial"}
    assert shop.value("length", answer("good"), example=half, tokens=5, correctness=nested) == 0.0


@pytest.mark.parametrize(
    ("tokens", "value"),
    [(0, 0.0), (1, 0.0), (50, 0.0), (75, 0.5), (99, 0.98), (100, 1.0), (200, 1.0), (225, 0.5), (250, 0.0), (9999, 0.0)],
)
def test_target(shop, tokens, value):
    given = {"shape": "target", "min_tokens": 100, "max_tokens": 200, "margin": 50}
    assert shop.value("length", "anything", tokens=tokens, **given) == pytest.approx(value)
    assert window(tokens, 100, 200, 0) == float(100 <= tokens <= 200)


def test_target_can_ask_for_right_answers(shop):
    given = {"shape": "target", "correctness": {"use": "correctness"}, "example": GOOD, "tokens": 5}
    assert shop.value("length", answer("good"), **given) == 1.0
    assert shop.value("length", answer("bad"), **given) == 0.0


@pytest.mark.parametrize(
    ("tokens", "value"), [(0, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (101, -1.0), (10**9, -1.0)]
)
def test_overlong(tokens, value):
    assert overlong(tokens, 100, 20) == pytest.approx(value)


def test_overlong_as_a_reward(shop):
    assert shop.value("length", "", tokens=90, shape="overlong", max_tokens=100, margin=20) == -0.5
    assert overlong(100, 100, 0) == 0.0
    assert overlong(101, 100, 0) == -1.0


def test_cosine_is_monotone_and_clamped():
    values = [cosine(n, 100, 1.0, 0.5) for n in range(1000)]
    assert values == sorted(values, reverse=True)
    assert values[100:] == [0.5] * 900


def test_length_is_in_tokens_not_characters(shop):
    given = {"shape": "overlong", "max_tokens": 100, "margin": 0}
    assert shop.value("length", "x" * 10_000, tokens=100, **given) == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"margin": 5}, "margin: means nothing with shape: cosine"),
        ({"shape": "target", "wrong_long": 0.5}, "wrong_long: means nothing with shape: target"),
        ({"shape": "overlong", "min_tokens": 5}, "min_tokens: means nothing"),
        ({"shape": "overlong", "correctness": {"use": "correctness"}}, "correctness: means nothing"),
        ({"shape": "target", "min_tokens": 9, "max_tokens": 5}, "is at most max_tokens"),
        ({"shape": "overlong", "margin": 9, "max_tokens": 5}, "is at most max_tokens"),
    ],
)
def test_parameters_of_other_shapes_are_refused(shop, given, message):
    with pytest.raises(ValidationError, match=message):
        shop.build("length", **given)


def test_a_nested_reward_that_loses_scores_is_named(shop):
    length = Length(shop.component("length").params, lambda rollouts: [])
    with pytest.raises(ConformanceError, match="0 scores for 1 rollouts"):
        length([rollout("a")])


# -- rouge


def test_rouge(shop):
    example = Example(id="e", prompt="Q", references=("the cat sat on the mat", "a dog"))
    assert shop.value("rouge", "the cat sat on the mat", example=example) == 1.0
    # 3 of 3 words given and 3 of 6 wanted: 2 * 1 * 0.5 / 1.5.
    assert shop.value("rouge", "the cat sat", example=example) == pytest.approx(2 / 3)
    assert shop.value("rouge", "a dog", example=example) == 1.0
    assert shop.value("rouge", "", example=example) == 0.0
    # The thought does not count, neither the model's nor the reference's.
    assert shop.value("rouge", "<think>words, words</think>the cat sat on the mat", example=example) == 1.0
    assert shop.value("rouge", "<think>the cat sat on the mat", example=example) == 0.0
    thought = Example(id="e", prompt="Q", completion="<think>a long thought</think>the cat")
    assert shop.value("rouge", "the cat", example=thought) == 1.0


def test_rouge_without_a_reference_is_unscorable(shop):
    for example in (None, Example(id="e", prompt="Q")):
        assert shop.score("rouge", "text", example=example).status == "unscorable"


def test_rouge_takes_metrics_that_compare(shop):
    example = Example(id="e", prompt="Q", references=("Ein Kätzchen",))
    assert shop.value("rouge", "ein kätzchen!", example=example, metric={"use": "exact-match"}) == 1.0
    code = {"use": "rouge-l", "tokenizer": "unicode"}
    assert shop.value("rouge", "kätzchen", example=example, metric=code) == pytest.approx(2 / 3)
    for name in ("perplexity", "length", "parse-rate"):
        with pytest.raises(RecipeError, match="does not compare"):
            shop.build("rouge", metric={"use": name})


# -- teacher-logprob


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from kdkit.models.pretrained import quiet
    from kdkit.testing.tiny import save_tiny_model

    with quiet():
        return save_tiny_model(tmp_path_factory.mktemp("tiny") / "a", seed=3)


@pytest.fixture
def teacher_shop(tiny):
    from kdkit.plugins.teachers import plugin as teachers

    shop = Workshop()
    found = shop.lookup.find
    specs = {spec.name: spec for spec in teachers.kdkit_teachers()}
    shop.lookup.find = lambda kind, name: (
        Found(specs[name], f"kdkit/{name}", "v1", __file__) if kind == "teacher" else found(kind, name)
    )
    return shop


def logprob_by_hand(path, prompt_ids, answer_ids):
    """One row, no padding, no blocks, float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    ids = torch.tensor([[*prompt_ids, *answer_ids]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1)
    taken = logprobs.gather(-1, ids[0, 1:, None])[len(prompt_ids) - 1 :, 0]
    assert len(taken) == len(answer_ids)
    return float(taken.mean())


def test_teacher_logprob(teacher_shop, tiny):
    from kdkit.models.chat import ChatEncoder
    from kdkit.testing.tiny import tiny_tokenizer

    encoder = ChatEncoder(tiny_tokenizer())
    given = {"teacher": {"use": "local", "model": str(tiny), "precision": "fp32"}, "tokenizer": str(tiny)}
    reward = teacher_shop.build("teacher-logprob", floor=10.0, batch_size=2, **given)
    example = Example(id="e", prompt=(Message("user", "say it"),))
    answers = [(1, 2, 3), (7,), (100, 101, 102, 103, 258), ()]
    rollouts = [Rollout(encoder.prompt_text(example), "x", ids, example) for ids in answers]
    rollouts.append(Rollout("a plain prompt", "x", (5, 6)))
    rollouts.append(Rollout("a plain prompt", "x", (5, 10**6)))
    scores = reward(rollouts)
    prompt, plain = encoder.prompt(example), encoder.prompt(Example(id="", prompt="a plain prompt"))
    wanted = [logprob_by_hand(tiny, prompt, ids) / 10 for ids in answers[:3]]
    assert [score.value for score in scores[:3]] == pytest.approx(wanted, abs=1e-6)
    assert all(-1 < value < 0 for value in wanted)
    assert [scores[3].value, scores[5].value] == [-1.0, -1.0]
    (bare,) = reward([Rollout("", "x", (5, 6))])
    assert (bare.status, bare.value, bare.reason) == ("unscorable", None, "the prompt has no tokens")
    assert scores[4].value == pytest.approx(logprob_by_hand(tiny, plain, (5, 6)) / 10, abs=1e-6)
    alone = [reward([one])[0].value for one in rollouts]
    assert alone == pytest.approx([score.value for score in scores], abs=1e-6)
    strict = teacher_shop.build("teacher-logprob", floor=0.1, **given)
    assert strict(rollouts)[0].value == -1.0
    reward.close()


def test_teacher_logprob_refuses_top_k(teacher_shop, tiny):
    teacher = {"use": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m"}
    with pytest.raises(RecipeError, match="gives no full logits"):
        teacher_shop.build("teacher-logprob", teacher=teacher, tokenizer=str(tiny))
