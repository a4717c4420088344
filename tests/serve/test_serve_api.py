from __future__ import annotations

import contextlib
import gc
import json
import math
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
import torch

import kdkit.serve.app
import kdkit.serve.run
from kdkit.api import Sampling
from kdkit.api.artifacts import Model
from kdkit.api.data import Message
from kdkit.api.errors import EnvironmentUnmet, RecipeError, StageError
from kdkit.models.load import load_model
from kdkit.serve.batcher import AnswerJob, Batcher, ScoreJob
from kdkit.serve.limits import Limits
from kdkit.serve.model import ServedModel
from kdkit.serve.run import check_host, listen
from kdkit.testing.tiny import save_tiny_model, tiny_tokenizer

IDS = [65, 66, 67, 200, 3, 70, 71, 72]


def post(url, path="/completions", key=None, **body):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{url}{path}", json={"model": "t", **body}, headers=headers, timeout=60, trust_env=False)


def choice(url, **body):
    answer = post(url, **body)
    assert answer.status_code == 200, answer.text
    (only,) = answer.json()["choices"]
    return only


def message(answer):
    return answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def reference(teacher_dir):
    """log-probabilities [T, V] in float64 from transformers' own forward."""
    model = load_model(Model(path=teacher_dir), dtype=torch.float64)

    def logprobs(ids):
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)

    return logprobs


def test_prompt_logprobs_are_those_of_the_model(url, reference):
    got = choice(url, prompt=IDS, max_tokens=0, echo=True, prompt_logprobs=5)["prompt_logprobs"]
    want = reference(IDS)
    assert got[0] is None
    assert len(got) == len(IDS)
    for position, entries in enumerate(got[1:], 1):
        row = want[position - 1]
        top = row.topk(5).indices.tolist()
        assert set(entries) == {str(i) for i in {*top, IDS[position]}}
        for name, entry in entries.items():
            assert entry["logprob"] == pytest.approx(float(row[int(name)]), abs=1e-4)
            assert entry["rank"] == int((row > row[int(name)]).sum()) + 1
            assert entry["decoded_token"] == tiny_tokenizer().decode([int(name)])


def test_echoed_logprobs_say_the_same_in_the_older_shape(url, reference):
    got = choice(url, prompt=IDS, max_tokens=0, echo=True, logprobs=4, return_tokens_as_token_ids=True)["logprobs"]
    want = reference(IDS)
    assert got["tokens"] == [f"token_id:{i}" for i in IDS]
    assert got["token_logprobs"][0] is None
    assert got["top_logprobs"][0] is None
    for position in range(1, len(IDS)):
        row = want[position - 1]
        assert got["token_logprobs"][position] == pytest.approx(float(row[IDS[position]]), abs=1e-4)
        names = {f"token_id:{i}" for i in [*row.topk(4).indices.tolist(), IDS[position]]}
        assert set(got["top_logprobs"][position]) == names


def test_logprobs_of_what_was_generated(url, reference):
    got = choice(url, prompt=IDS, max_tokens=3, temperature=0, logprobs=2, return_tokens_as_token_ids=True)
    written = [int(token.removeprefix("token_id:")) for token in got["logprobs"]["tokens"]]
    want = reference([*IDS, *written])
    assert len(written) == 3
    assert got["finish_reason"] == "length"
    assert written[0] == int(want[len(IDS) - 1].argmax())
    own = [float(want[len(IDS) - 1 + i][token]) for i, token in enumerate(written)]
    assert got["logprobs"]["token_logprobs"] == pytest.approx(own, abs=1e-4)


def test_all_entries_of_a_vocabulary_sum_to_one(url):
    got = choice(url, prompt=IDS, max_tokens=0, echo=True, prompt_logprobs=512)["prompt_logprobs"]
    for entries in got[1:]:
        assert len(entries) == 259
        assert sum(math.exp(entry["logprob"]) for entry in entries.values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("prompt", [[7], "x"])
def test_a_prompt_of_one_token_has_no_logprobs(url, prompt):
    got = choice(url, prompt=prompt, max_tokens=0, echo=True, prompt_logprobs=3, logprobs=3)
    assert got["prompt_logprobs"] == [None]
    assert got["logprobs"]["token_logprobs"] == [None]


def test_several_prompts_come_back_in_order(url):
    prompts = [[65, 66, 67, 68, 69], [70, 71], [72, 73, 74]]
    answer = post(url, prompt=prompts, max_tokens=0, echo=True, prompt_logprobs=2).json()
    assert [item["index"] for item in answer["choices"]] == [0, 1, 2]
    for prompt, item in zip(prompts, answer["choices"], strict=True):
        alone = choice(url, prompt=prompt, max_tokens=0, echo=True, prompt_logprobs=2)["prompt_logprobs"]
        for one, other in zip(item["prompt_logprobs"][1:], alone[1:], strict=True):
            assert set(one) == set(other)
            assert [e["logprob"] for e in one.values()] == pytest.approx(
                [e["logprob"] for e in other.values()], abs=1e-4
            )


def test_requests_that_come_together_are_computed_together(served, start, monkeypatch):
    sizes = []
    score = served.score
    monkeypatch.setattr(served, "score", lambda prompts, k: sizes.append(len(prompts)) or score(prompts, k))
    url = start(requests=64).url
    prompts = [[i, i + 1, i + 2, *range(i)] for i in range(3, 27)]

    def ask(prompt):
        return choice(url, prompt=prompt, max_tokens=0, echo=True, prompt_logprobs=3)["prompt_logprobs"]

    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(ask, prompts))
    assert sum(sizes) == 24
    assert max(sizes) > 1
    for prompt, entries in zip(prompts, together, strict=True):
        want = score([prompt], 3)[0]
        for row, (names, entry) in enumerate(zip(want.ids.tolist(), entries[1:], strict=True)):
            assert {str(name) for name in names} <= set(entry)
            assert entry[str(prompt[row + 1])]["logprob"] == pytest.approx(float(want.own[row]), abs=1e-4)


def test_chat_answers_as_the_model_does_here(url, served):
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    body = post(url, "/chat/completions", messages=messages, max_tokens=9, temperature=0).json()
    ids = served.chat_ids([Message("user", "What is 2 + 2?")])
    (said,) = served.answer([ids], Sampling(max_new_tokens=9), [0], 1)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": said.text}
    assert body["choices"][0]["finish_reason"] == ("length" if said.truncated else "stop")
    assert body["usage"]["prompt_tokens"] == len(ids)


def test_sampling_repeats_with_a_seed(url):
    texts = [choice(url, prompt="Say ", max_tokens=12, seed=seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_models_say_what_clients_need(url, served):
    (entry,) = httpx.get(f"{url}/models", trust_env=False).json()["data"]
    assert entry["id"] == "t"
    assert entry["max_logprobs"] == 259
    assert entry["vocabulary"]["fingerprint"] == served.vocabulary.fingerprint
    assert entry["fingerprint"] == served.fingerprint
    answer = post(url, prompt=IDS, max_tokens=1).json()
    assert (answer["model"], answer["system_fingerprint"]) == ("t", f"fp_{served.fingerprint[:16]}")


def test_the_fingerprint_is_that_of_weights_layers_and_precision(teacher_dir, served, tmp_path):
    def of(path=teacher_dir, dtype=torch.float32, **values):
        return ServedModel(Model(path=path, **values), dtype=dtype, device="cpu").fingerprint

    assert of(name="another name") == served.fingerprint
    others = {of(dtype=torch.bfloat16), of(keep_layers=2), of(save_tiny_model(tmp_path / "m", layers=3, seed=2))}
    assert len(others - {served.fingerprint}) == 3


def test_without_the_key_nothing_is_answered(start):
    url = start(key="correct-horse").url
    for key in (None, "wrong", "correct-horsf", "correct-hors", "correct-horse-2"):
        refused = post(url, prompt=IDS, max_tokens=0, echo=True, prompt_logprobs=1, key=key)
        assert refused.status_code == 401
        assert "correct" not in refused.text
    assert httpx.get(f"{url}/models", trust_env=False).status_code == 401
    basic = {"Authorization": "Basic correct-horse"}
    assert httpx.get(f"{url}/models", headers=basic, trust_env=False).status_code == 401
    assert post(url, prompt=IDS, max_tokens=1, key="correct-horse").status_code == 200


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": IDS, "max_tokens": 0}, "nothing is asked"),
        ({"prompt": []}, "empty"),
        ({"prompt": ""}, "empty"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [259]}, "0 to 258"),
        ({"prompt": [-1]}, "0 to 258"),
        ({"prompt": IDS, "prompt_logprobs": 513}, "at most 512"),
        ({"prompt": IDS, "logprobs": -1}, "logprobs"),
        ({"prompt": IDS, "max_tokens": 33}, "at most 32"),
        ({"prompt": [1] * 60, "max_tokens": 5}, "may have 64"),
        ({"prompt": [[1]] * 5}, "at most 4"),
        ({"prompt": IDS, "n": 2}, "'n' is not supported"),
        ({"prompt": IDS, "stop": ["x"]}, "'stop' is not supported"),
        ({"prompt": IDS, "temperature": -1}, "temperature"),
        ({"prompt": IDS, "seed": "1"}, "seed"),
        ({"max_tokens": 1}, "prompt"),
    ],
)  # fmt: skip
def test_requests_outside_the_limits_are_refused_in_one_line(start, body, says):
    url = start(new_tokens=32, prompt_tokens=64, prompts=4).url
    refused = post(url, **body)
    assert refused.status_code == 400
    assert says in message(refused)
    assert "\n" not in message(refused)


def test_other_models_bodies_and_kinds_are_refused(start):
    url = start(body_bytes=1000).url
    assert post(url, model="other", prompt=IDS).status_code == 404
    assert post(url, prompt=[1] * 1000).status_code == 413
    raw = {"trust_env": False, "headers": {"Content-Type": "application/json"}}
    for content in (b"", b"{", b"[]", b"[" * 900, b'{"model": "t", "prompt": "\xff"}'):
        assert httpx.post(f"{url}/completions", content=content, **raw).status_code == 400
    plain = httpx.post(f"{url}/completions", content=b"{}", headers={"Content-Type": "text/plain"}, trust_env=False)
    assert plain.status_code == 415


def test_answers_too_large_are_refused_before_they_are_computed(start, monkeypatch):
    monkeypatch.setattr(kdkit.serve.app, "MOST_ENTRIES", 100)
    refused = post(start().url, prompt=IDS, max_tokens=0, echo=True, prompt_logprobs=20)
    assert (refused.status_code, "at most 100" in message(refused)) == (400, True)


def test_a_body_that_drips_is_given_up(start):
    url = start(body_seconds=0.2).url
    port = int(url.rpartition(":")[2].removesuffix("/v1"))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        raw.sendall(b"Content-Length: 500\r\n\r\n{")
        assert b" 408 " in raw.recv(4096)


def test_a_head_that_drips_is_given_up(start, monkeypatch):
    monkeypatch.setattr(kdkit.serve.run, "HEAD_SECONDS", 0.3)
    url = start().url
    port = int(url.rpartition(":")[2].removesuffix("/v1"))
    for before in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
            raw.sendall(before)
            if before:
                assert b" 200 " in raw.recv(4096)
            left = 200
            with contextlib.suppress(ConnectionError):
                while left:
                    raw.sendall(b"POST /v1/completions HTTP/1.1\r\n" if left == 200 else b"X-Filler: 1\r\n")
                    left -= 1
                    time.sleep(0.05)
            assert left, "the connection stayed open"


def test_an_answer_may_take_longer_than_a_head(start, monkeypatch, served):
    monkeypatch.setattr(kdkit.serve.run, "HEAD_SECONDS", 0.1)
    answer = served.answer
    monkeypatch.setattr(served, "answer", lambda *values: time.sleep(0.5) or answer(*values))
    assert post(start().url, prompt=IDS, max_tokens=1).status_code == 200


def test_half_characters_are_refused(start):
    url = start().url
    for path, body in (
        ("completions", b'{"model": "t", "prompt": "\\ud800"}'),
        ("completions", b'{"model": "t", "prompt": ["a", "\\udfff"]}'),
        ("chat/completions", b'{"model": "t", "messages": [{"role": "user", "content": "\\ud800"}]}'),
    ):
        headers = {"Content-Type": "application/json"}
        refused = httpx.post(f"{url}/{path}", content=body, headers=headers, trust_env=False)
        assert refused.status_code == 400
        assert "not valid Unicode" in message(refused)


def test_tokens_that_the_model_lacks_are_refused_also_in_texts(start, tmp_path):
    path = save_tiny_model(tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<added later>"])
    tokenizer.save_pretrained(path)
    url = start(model=ServedModel(Model(path=path, name="t"), dtype=torch.float32, device="cpu")).url
    refused = post(url, prompt="a <added later>", max_tokens=0, echo=True, prompt_logprobs=1)
    assert (refused.status_code, message(refused)) == (400, "a token id is outside the vocabulary, 0 to 258")
    chat = post(url, "/chat/completions", messages=[{"role": "user", "content": "a <added later>"}])
    assert chat.status_code == 400
    assert post(url, prompt="a", max_tokens=1).status_code == 200


def test_a_temperature_near_zero_is_greedy(url):
    texts = [choice(url, prompt="Say ", max_tokens=12, temperature=t)["text"] for t in (0, 1e-300, 1e-6)]
    assert texts[0] == texts[1] == texts[2] != ""


def test_whatever_the_model_raises_the_server_goes_on():
    model = Blocked()
    model.score = lambda prompts, k: [][k]
    batcher = Batcher(model, Limits())
    job, other = ScoreJob((1, 2), 3), AnswerJob((1,), Sampling(max_new_tokens=4), 5)
    batcher.submit([job])
    with pytest.raises(StageError, match="IndexError"):
        job.result.result(30)
    batcher.submit([other])
    assert other.result.result(30) == "said"
    assert batcher.close(30)


class Blocked:
    """A model that computes when it is told to."""

    vocabulary = SimpleNamespace(size=259, fingerprint="f", tokens=259)
    context = 64
    fingerprint = "f" * 64

    def __init__(self):
        self.go, self.busy, self.calls = threading.Event(), threading.Event(), []

    def score(self, prompts, k):
        self.calls.append(list(prompts))
        self.busy.set()
        assert self.go.wait(30)
        raise RuntimeError("out of luck")

    def answer(self, prompts, sampling, seeds, batch):
        self.calls.append((list(prompts), sampling, seeds))
        return ["said"] * len(prompts)


def test_more_requests_than_allowed_are_asked_to_come_again(start):
    model = Blocked()
    url = start(model=model, requests=1).url
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, url, prompt=IDS, max_tokens=0, echo=True, prompt_logprobs=1)
        assert model.busy.wait(30)
        second = post(url, prompt=IDS, max_tokens=0, echo=True, prompt_logprobs=1)
        model.go.set()
        assert second.status_code == 429
        assert second.headers["Retry-After"] == "1"
        # What goes wrong inside is told in a word, and the server goes on.
        assert first.result().status_code == 500
    assert message(first.result()) == "the model failed: RuntimeError"


def test_jobs_of_clients_that_left_are_dropped(start, monkeypatch, caplog):
    monkeypatch.setattr(kdkit.serve.app, "_GONE_SECONDS", 0.02)
    model = Blocked()
    running = start(model=model)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, running.url, prompt=IDS, max_tokens=0, echo=True, prompt_logprobs=1)
        assert model.busy.wait(30)
        body = {"model": "t", "prompt": [1, 2], "max_tokens": 0, "echo": True, "prompt_logprobs": 1}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/completions", json=body, timeout=0.3, trust_env=False)
        deadline = time.monotonic() + 30
        while any(not job.result.cancelled() for job in running.batcher._waiting) and time.monotonic() < deadline:
            time.sleep(0.01)
        model.go.set()
        first.result()
    assert running.batcher.close(30)
    assert model.calls == [[tuple(IDS)]]
    gc.collect()
    assert not caplog.records, "asyncio reports what nobody waited for"


def test_a_batch_has_one_kind_of_work_and_a_bound():
    model = Blocked()
    model.go.set()
    batcher = Batcher(model, Limits(batch_rows=2, batch_tokens=100))
    greedy, hot = Sampling(max_new_tokens=4), Sampling(do_sample=True, temperature=2.0, max_new_tokens=4)
    jobs = [AnswerJob((1,), greedy, 5), ScoreJob((1, 2), 3), AnswerJob((2,), hot, 6), AnswerJob((3,), greedy, 7),
            AnswerJob((4,), greedy, 8)]  # fmt: skip
    batcher.submit(jobs)
    assert [job.result.result(30) for job in jobs if isinstance(job, AnswerJob)] == ["said"] * 4
    with pytest.raises(StageError):
        jobs[1].result.result(30)
    assert batcher.close(30)
    assert model.calls == [
        ([(1,), (3,)], greedy, [5, 7]), [(1, 2)], ([(2,)], hot, [6]), ([(4,)], greedy, [8]),
    ]  # fmt: skip


def test_a_closed_batcher_cancels_what_comes():
    batcher = Batcher(Blocked(), Limits())
    assert batcher.close(30)
    job = ScoreJob((1, 2), 1)
    batcher.submit([job])
    assert job.result.cancelled()


def test_numbers_that_are_not_finite_are_no_answer(start, teacher_dir):
    model = ServedModel(Model(path=teacher_dir), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        model._model.get_output_embeddings().weight[5] = float("nan")
    refused = post(start(model=model).url, prompt=IDS, max_tokens=0, echo=True, prompt_logprobs=2)
    assert (refused.status_code, message(refused)) == (500, "the model's log-probabilities are not finite")


def test_a_model_without_a_chat_template_says_so(start, tmp_path):
    save_tiny_model(tmp_path / "m")
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").unlink(missing_ok=True)
    model = ServedModel(Model(path=tmp_path / "m"), dtype=torch.float32, device="cpu")
    refused = post(start(model=model).url, "/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert (refused.status_code, "no chat template" in message(refused)) == (400, True)


def test_nothing_is_loaded_from_elsewhere(url):
    base = url.removesuffix("/v1")
    assert [httpx.get(f"{base}/{p}", trust_env=False).status_code for p in ("docs", "redoc", "openapi.json")] == [
        404
    ] * 3
    assert httpx.get(f"{base}/health", trust_env=False).status_code == 200


def test_other_machines_need_a_key():
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(RecipeError, match="needs a key"):
            check_host(host, has_key=False)
        check_host(host, has_key=True)
    for host in ("127.0.0.1", "localhost", "127.8.0.1"):
        check_host(host, has_key=False)
    with pytest.raises(EnvironmentUnmet, match="no address"):
        check_host("no such host", has_key=True)


def test_a_taken_port_is_named():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(EnvironmentUnmet, match=f"cannot listen on 127.0.0.1:{port}"):
            listen("127.0.0.1", port)


def test_the_batch_never_has_all_logits(served, monkeypatch):
    widest = []
    project = type(served._parts).project

    def measured(self, hidden):
        widest.append(len(hidden))
        return project(self, hidden)

    monkeypatch.setattr(type(served._parts), "project", measured)
    monkeypatch.setattr("kdkit.serve.model.block_tokens", lambda _: 16)
    prompts = [list(range(50)), list(range(100, 180))]
    blocked = served.score(prompts, 4)
    assert max(widest) <= 16
    monkeypatch.undo()
    for one, other in zip(blocked, served.score(prompts, 4), strict=True):
        assert torch.equal(one.ids, other.ids)
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)


def test_json_of_an_answer_is_plain(url):
    text = post(url, prompt=IDS, max_tokens=0, echo=True, prompt_logprobs=2).text
    assert "NaN" not in text
    assert json.loads(text)["object"] == "text_completion"
