from __future__ import annotations

import copy
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import faulty_server
import numpy as np
import pytest
import torch
from faulty_server import FaultyServer, right
from pydantic import ValidationError

from kdkit.api import Message, Sampling
from kdkit.api.artifacts import Model
from kdkit.api.data import Example
from kdkit.api.errors import EnvironmentUnmet, KdkitError, ModelError, RecipeError, StageError
from kdkit.models.chat import Encoded
from kdkit.models.pretrained import quiet
from kdkit.plugins.teachers import openai_http
from kdkit.plugins.teachers.openai import OpenAITeacher
from kdkit.plugins.teachers.plugin import OpenAITeacherParams
from kdkit.testing.tiny import save_tiny_model
from kdkit.train.batching import collate
from kdkit.train.packing import pack

KEY = "sk-canary-0123456789"
ROWS = [
    Encoded("a", (10, 11, 12, 13, 14, 15), (False, False, False, True, True, False)),
    Encoded("b", (20, 21, 22), (False, True, True)),
    Encoded("c", (30, 31, 32, 33, 34, 35, 36, 37), (False, False, False, False, False, False, True, True)),
]
SAY = [Example(id=f"p{i}", prompt=(Message("user", f"question {i}"),)) for i in range(4)]


@dataclass
class Context:
    """A ``BuildContext`` for a teacher."""

    model: object
    lines: list[str] = field(default_factory=list)
    seed: int = 0
    offline: bool = True
    device: str = "cpu"

    def resolve(self, _ref):
        return Model(path=self.model)

    def log(self, message):
        self.lines.append(message)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    with quiet():
        return save_tiny_model(tmp_path_factory.mktemp("tokenizer") / "m")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(openai_http, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("TEACHER_KEY", KEY)


@pytest.fixture
def server():
    with FaultyServer() as running:
        yield running


@pytest.fixture
def make(server, tokenizer_dir):
    """Builds teachers of the faulty server."""
    made = []

    def build(**values):
        values = {"base_url": server.url, "model": "m", "tokenizer": str(tokenizer_dir), "top_k": 4,
                  "max_retries": 2, "timeout": 20.0, **values}  # fmt: skip
        context = Context(tokenizer_dir)
        teacher = OpenAITeacher(OpenAITeacherParams.model_validate_json(json.dumps(values)), context)
        teacher.context = context
        made.append(teacher)
        return teacher

    yield build
    for teacher in made:
        teacher.close()
        teacher.close()


def expected(rows, k=4):
    """What the right server says about the learned tokens of ``rows``, most probable first."""
    ids, logprobs = [], []
    for document in rows:
        for position, learned in enumerate(document.learned):
            if learned:
                entries = faulty_server.row(document.ids[position], k, position)
                best = sorted(entries.items(), key=lambda item: -item[1]["logprob"])[:k]
                ids.append([int(name) for name, _ in best])
                logprobs.append([entry["logprob"] for _, entry in best])
    return torch.tensor(ids), torch.tensor(logprobs)


def everything(signals):
    block = signals.block(0, len(signals.ids))
    return block.ids, block.logprobs


def scoring(change):
    """An answer that is right for the probe and changed for documents."""

    def answer(handler, body):
        value = right(body)
        return value if isinstance(body["prompt"], str) else change(handler, body, value)

    return answer


def changed(edit):
    """As ``scoring``, with the list of prompt_logprobs edited in place."""

    def change(_handler, _body, value):
        edit(value["choices"][0]["prompt_logprobs"])
        return value

    return scoring(change)


def failing(times, fault):
    """The first ``times`` answers about documents are faults; ``fault(handler, body)`` sends one."""
    left = [times]
    lock = threading.Lock()

    def change(handler, body, value):
        with lock:
            left[0] -= 1
            bad = left[0] >= 0
        return fault(handler, body) if bad else value

    return scoring(change)


# --- what a working server gives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [pack, collate, lambda rows: collate(rows, side="left")])
def test_every_learned_token_gets_its_own_row(make, server, layout):
    batch = layout(ROWS)
    ids, logprobs = everything(make().signals(batch))
    order = {row.id: row for row in ROWS}
    want_ids, want = expected([order[name] for name in batch.example_ids])
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(logprobs, want, atol=1e-6, rtol=0)
    assert logprobs.dtype is torch.float32
    sent = [body["prompt"] for body in server.script.requests if isinstance(body["prompt"], list)]
    # Nothing after the last learned token is sent.
    assert sorted(sent) == [[10, 11, 12, 13, 14], [20, 21, 22], [30, 31, 32, 33, 34, 35, 36, 37]]


def test_the_learned_tokens_themselves_have_log_probabilities_among_the_k_or_not(make):
    batch = pack(ROWS)
    order = {row.id: row for row in ROWS}
    want, outside = [], 0
    for row in (order[name] for name in batch.example_ids):
        for position, learned in enumerate(row.learned):
            if learned:
                entries = faulty_server.row(row.ids[position], 4, position)
                want.append(entries[str(row.ids[position])]["logprob"])
                outside += want[-1] < min(sorted((e["logprob"] for e in entries.values()), reverse=True)[:4])
    signals = make().signals(batch)
    torch.testing.assert_close(signals.block(0, len(want)).taken, torch.tensor(want), atol=1e-6, rtol=0)
    assert outside, "at some tokens the sent one is none of the four most probable"


def test_blocks_are_slices_at_temperature_one(make):
    signals = make().signals(collate(ROWS))
    whole, part = signals.block(0, 6), signals.block(2, 5)
    assert torch.equal(part.taken, whole.taken[2:5])
    assert torch.equal(part.ids, whole.ids[2:5])
    assert torch.equal(part.logprobs, whole.logprobs[2:5])
    assert part.temperature == 1.0


def test_a_server_that_echoes_gives_the_same(make, server):
    def echo_only(_handler, body):
        value = right(body)
        value["choices"][0].pop("prompt_logprobs", None)
        return value

    want = everything(make().signals(pack(ROWS)))
    server.script.answer = echo_only
    got = everything(make().signals(pack(ROWS)))
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], atol=0, rtol=0)
    assert server.script.requests[-1]["logprobs"] == 4


def test_entries_in_another_order_are_the_same_entries(make, server):
    def shuffle(entries):
        for index, item in enumerate(entries):
            if item:
                entries[index] = dict(reversed(item.items()))

    want = everything(make().signals(pack(ROWS)))
    server.script.answer = changed(shuffle)
    got = everything(make().signals(pack(ROWS)))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_a_batch_without_learned_tokens(make):
    row = Encoded("a", (1, 2, 3), (False, False, False))
    ids, logprobs = everything(make().signals(collate([row])))
    assert ids.shape == logprobs.shape == (0, 4)


def test_requests_are_sent_side_by_side(make, server):
    together = threading.Barrier(3, timeout=30)
    server.script.answer = scoring(lambda _handler, _body, value: together.wait() is not None and value)
    assert len(make(concurrency=3).signals(collate(ROWS)).ids) == 6


# --- the cap ----------------------------------------------------------------------------------------------------------


def capped(cap, *, refuses):
    def answer(handler, body):
        if refuses and body.get("prompt_logprobs", body.get("logprobs", 0)) > cap:
            handler.send({"error": {"message": f"greater than max allowed: {cap}"}}, 400)
            return None
        return right(body, cap)

    return answer


@pytest.mark.parametrize("refuses", [True, False])
def test_auto_takes_what_the_server_gives(make, server, refuses):
    server.script.answer = capped(20, refuses=refuses)
    teacher = make(top_k="auto")
    assert teacher.signals(collate(ROWS)).ids.shape == (6, 20)
    assert teacher.context.lines == [f"{server.url}: 20 log-probabilities per token"]
    teacher.signals(collate(ROWS))
    # Asked once.
    assert len(teacher.context.lines) == 1


@pytest.mark.parametrize("refuses", [True, False])
def test_fewer_than_asked_is_one_line_that_says_the_cap(make, server, refuses):
    server.script.answer = capped(20, refuses=refuses)
    with pytest.raises(StageError) as error:
        make(top_k=64).signals(collate(ROWS))
    assert "at most 20 log-probabilities per token, top_k asks for 64; set top_k: 20 or top_k: auto" in str(error.value)


def test_a_sent_token_that_is_always_added_does_not_count(make, server):
    def added(_handler, body):
        # Three of the most probable, and the token itself, which is never among them.
        return right(body, 3)

    server.script.answer = added
    with pytest.raises(StageError, match="at most 3 "):
        make(top_k=4).signals(collate(ROWS))


def test_servers_without_logprobs_are_refused_with_both_reasons(make, server):
    def text_only(handler, body):
        if "prompt_logprobs" in body:
            handler.send({"error": {"message": "no prompt_logprobs here"}}, 400)
            return None
        return {"choices": [{"index": 0, "text": "", "logprobs": None}]}

    server.script.answer = text_only
    with pytest.raises(StageError, match=r"no prompt_logprobs here.*has no logprobs"):
        make().signals(collate(ROWS))


def test_tokens_named_by_text_are_refused(make, server):
    def by_text(_handler, body):
        value = right(body)
        value["choices"][0].pop("prompt_logprobs", None)
        if "logprobs" in body:
            value["choices"][0]["logprobs"]["tokens"] = ["a"] * 200
            for name in ("token_logprobs", "top_logprobs"):
                value["choices"][0]["logprobs"][name] = [None] * 200
        return value

    server.script.answer = by_text
    with pytest.raises(StageError, match="by their text, which is ambiguous"):
        make().signals(collate(ROWS))


def test_top_k_beyond_the_vocabulary(make):
    with pytest.raises(ModelError, match="top_k is 300"):
        make(top_k=300).signals(collate(ROWS))


# --- another model behind the name ------------------------------------------------------------------------------------


def test_a_server_without_the_model_is_refused_by_name(make, server):
    server.script.models = {"data": [{"id": "other"}, {"id": "third"}, {"no": 1}, 7]}
    with pytest.raises(ModelError, match="no model 'm'; allowed: other, third"):
        make().generate(SAY, Sampling(), 0)


@pytest.mark.parametrize("listed", [lambda h: h.send({}, 404), {"data": 3}, {"data": [{"id": "m", "vocabulary": 5}]}])
def test_a_server_without_a_list_of_models_is_believed(make, server, listed):
    server.script.models = listed
    assert len(make().generate(SAY, Sampling(), 0)) == 4


def test_a_server_that_says_it_has_another_vocabulary_is_refused(make, server):
    server.script.models = {"data": [{"id": "m", "vocabulary": {"fingerprint": "0" * 64}}]}
    with pytest.raises(ModelError, match="another tokenizer"):
        make().signals(collate(ROWS))


@pytest.mark.parametrize("extra", [1, 3])
def test_a_server_with_another_tokenizer_is_found_out(make, server, extra):
    def other(_handler, body):
        if isinstance(body["prompt"], str):
            ids = faulty_server._TOKENIZER(body["prompt"])["input_ids"]
            body = {**body, "prompt": [(i + 1) % 259 for i in ids] if extra == 1 else [*ids, 1, 2, 3]}
        return right(body)

    server.script.answer = other
    with pytest.raises(ModelError, match="another tokenizer"):
        make().signals(collate(ROWS))


def test_log_probabilities_need_a_tokenizer(make):
    teacher = make(tokenizer=None)
    with pytest.raises(ModelError, match="has no tokenizer"):
        _ = teacher.vocabulary
    said = teacher.generate(SAY[:1], Sampling(), 0)
    assert (said[0].text, said[0].token_ids) == ("answer to question 0", ())


# --- faults that pass: retried, then right ----------------------------------------------------------------------------


def cut(handler, _body):
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def vanish(handler, _body):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def drip(handler, _body):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            break
        time.sleep(0.05)
    handler.close_connection = True


PASSING = {
    "500": lambda h, _b: h.send({"error": "boom"}, 500),
    "503 in HTML": lambda h, _b: h.send_bytes(b"<html>\x00 busy", 503),
    "429": lambda h, _b: h.send({"error": {"message": "slow down"}}, 429, Retry_After="0"),
    "408": lambda h, _b: h.send({}, 408),
    "cut": cut,
    "vanished": vanish,
    "half a JSON": lambda h, b: h.send_bytes(json.dumps(right(b)).encode()[:-20]),
    "HTML": lambda h, _b: h.send_bytes(b"<html>wait</html>"),
    "empty": lambda h, _b: h.send_bytes(b""),
    "deep": lambda h, _b: h.send_bytes(b"[" * 200_000),
    "not UTF-8": lambda h, _b: h.send_bytes(b'{"choices": "\xff\xfe"}'),
}


@pytest.mark.parametrize("name", PASSING)
def test_faults_that_pass_are_tried_again(make, server, name):
    want = everything(make().signals(pack(ROWS)))
    server.script.answer = failing(2, PASSING[name])
    got = everything(make().signals(pack(ROWS)))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", PASSING)
def test_faults_that_stay_end_in_one_line_that_says_how_often(make, server, name):
    server.script.answer = failing(10**6, PASSING[name])
    with pytest.raises(KdkitError) as error:
        make().signals(pack(ROWS[:1]))
    line = str(error.value)
    assert "(3 attempts)" in line
    assert f"{server.url}/completions" in line
    assert "\n" not in line
    # A server that answers nonsense is another thing than one that is not there.
    nonsense = name in {"half a JSON", "HTML", "empty", "deep", "not UTF-8"}
    assert int(error.value.exit_code) == (1 if nonsense else 4)


def test_slow_answers_are_given_up(make, server):
    gate = threading.Event()
    server.script.answer = failing(1, lambda _h, _b: gate.wait(20) and None)
    teacher = make(timeout=1.0)
    assert len(teacher.signals(pack(ROWS)).ids) == 6
    server.script.answer = failing(10**6, lambda _h, _b: gate.wait(20) and None)
    with pytest.raises(EnvironmentUnmet, match=r"no whole answer within 0.2 s \(1 attempt\)"):
        make(timeout=0.2, max_retries=0).signals(pack(ROWS[:1]))
    gate.set()


def test_an_answer_that_drips_is_given_up(make, server):
    server.script.answer = scoring(lambda h, b, _v: drip(h, b))
    with pytest.raises(EnvironmentUnmet, match=r"no whole answer within 0\.3 s"):
        make(timeout=0.3, max_retries=0).signals(pack(ROWS[:1]))


@pytest.mark.parametrize("piece", [b"X-Filler: 1\r\n", b"HTTP/1.1 102 Processing\r\n\r\n"])
def test_a_head_that_drips_is_given_up(make, server, piece):
    ended = threading.Event()

    def drip_head(handler, _body, _value):
        if piece.startswith(b"X"):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        handler.close_connection = True
        while not ended.wait(0.05):
            try:
                handler.wfile.write(piece)
            except OSError:
                ended.set()

    server.script.answer = scoring(drip_head)
    with pytest.raises(EnvironmentUnmet, match=r"no whole answer within 0\.3 s"):
        make(timeout=0.3, max_retries=0).signals(pack(ROWS[:1]))
    assert ended.wait(30), "the connection stayed open"


def test_a_server_that_is_not_there_is_the_environment(make, server):
    server.kill()
    with pytest.raises(EnvironmentUnmet, match=r"no connection \(.*refused\) \(3 attempts\); see that the server runs"):
        make().signals(pack(ROWS))


def test_a_server_killed_midway(make, server):
    def die(handler, _body, value):
        if len(server.script.requests) > 2:
            server.kill()
            vanish(handler, None)
            return None
        return value

    server.script.answer = scoring(die)
    with pytest.raises(EnvironmentUnmet, match="no connection"):
        make(concurrency=1).signals(pack(ROWS))


def test_pauses_grow_and_honour_the_server(make, server, monkeypatch):
    waited = []
    monkeypatch.setattr(openai_http, "FIRST_PAUSE", 1.0)
    teacher = make(max_retries=4)
    client = teacher._server
    monkeypatch.setattr(client, "_stopped", SimpleNamespace(wait=waited.append, is_set=lambda: False, set=lambda: None))
    times = iter(range(100))
    server.script.answer = failing(
        4, lambda h, _b: h.send({}, 429, **({"Retry_After": "11"} if next(times) == 2 else {}))
    )
    teacher.signals(pack(ROWS[:1]))
    assert len(waited) == 4
    assert [low <= pause <= high for pause, low, high in zip(waited, (0.5, 1, 11, 4), (1, 2, 11, 8), strict=True)] == [
        True
    ] * 4
    assert waited[2] == 11


def test_a_server_that_wants_a_day_is_not_waited_for(make, server):
    server.script.answer = failing(1, lambda h, _b: h.send({}, 429, Retry_After="86400"))
    with pytest.raises(EnvironmentUnmet, match="asked again after 86,400 s"):
        make().signals(pack(ROWS[:1]))


# --- faults that are refused at once ----------------------------------------------------------------------------------


def at(position, edit):
    def apply(entries):
        edit(entries[position])

    return changed(apply)


def last(entry):
    return entry[next(iter(entry))]


def send_whole(value):
    return scoring(lambda _h, _b, _v: value)


def with_choice(edit):
    def change(_handler, _body, value):
        edit(value["choices"][0])
        return value

    return scoring(change)


def twice(value):
    """The answer with two values for one token: a reader takes the last, which is the right one here."""
    entry = value["choices"][0]["prompt_logprobs"][4]
    name = next(iter(entry))
    whole = json.dumps(entry)
    return json.dumps(value).replace(whole, f'{{"{name}": {{"logprob": -5.0}}, {whole[1:]}').encode()


def huge(handler, _body, _value):
    handler.send_response(200)
    handler.send_header("Content-Length", str(10**12))
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" " * 2**20)
    except OSError:
        handler.close_connection = True


WRONG = {
    "NaN": (at(4, lambda e: last(e).update(logprob=float("nan"))), "has the number NaN"),
    "infinity": (at(4, lambda e: last(e).update(logprob=float("-inf"))), "has the number -Infinity"),
    "overflow": (
        scoring(lambda h, _b, v: h.send_bytes(json.dumps(v).replace(': -', ': -1e400, "x": -').encode())),
        "not finite",
    ),
    "positive": (at(4, lambda e: last(e).update(logprob=0.5)), "log-probability 0.5, above zero"),
    "too much": (at(4, lambda e: [x.update(logprob=-0.1) for x in e.values()]), "probabilities that sum to"),
    "text": (at(4, lambda e: last(e).update(logprob="-1")), "has a str where a log-probability belongs"),
    "true": (at(4, lambda e: last(e).update(logprob=True)), "has a bool where"),
    "null": (at(4, lambda e: last(e).update(logprob=None)), "has a NoneType where"),
    "integer": (at(4, lambda e: last(e).update(logprob=-(10**400))), "not finite|no whole JSON"),
    "fewer": (at(4, lambda e: [e.pop(k) for k in list(e)[:2]]), "has 3 log-probabilities at position 4, 4 were"),
    "none": (changed(lambda es: es.__setitem__(4, None)), "about another token at position 4"),
    "shifted": (changed(lambda es: es.insert(1, es.pop())), "about another token at position 1"),
    "other document": (
        scoring(lambda _h, b, _v: right({**b, "prompt": [99, 98, 97, *b["prompt"][3:]]})),
        "another token at position 1",
    ),
    "first token": (
        changed(lambda es: es.__setitem__(0, {"10": {"logprob": -0.1}})),
        "of the first token, which nothing comes before",
    ),
    "twice": (scoring(lambda h, _b, v: h.send_bytes(twice(v))), "has 25 twice in one mapping"),
    "raw logits": (
        at(4, lambda e: [x.update(logprob=-20.0 - i) for i, x in enumerate(e.values())]),
        "at position 4 that are too small for the 4 largest",
    ),
    "another model": (scoring(lambda _h, _b, v: {**v, "model": "cheap"}), "is of cheap, earlier ones were of no name"),
    "another set-up": (scoring(lambda _h, _b, v: {**v, "system_fingerprint": "fp_2"}), "is of fp_2, earlier ones were"),
    "other ids": (scoring(lambda _h, b, _v: right({**b, "prompt": [i + 1 for i in b["prompt"]]})), "another token"),
    "one short": (changed(lambda es: es.pop()), "has 4 positions for 5 tokens"),
    "one more": (changed(lambda es: es.append({})), "has 6 positions for 5 tokens"),
    "out of range": (at(4, lambda e: e.update({"259": {"logprob": -0.9}})), "names token 259"),
    "negative id": (at(4, lambda e: e.update({"-3": {"logprob": -0.9}})), "not by token id"),
    "two spellings": (at(4, lambda e: e.update({"05": {"logprob": -0.9}})), "not by token id"),
    "big id": (at(4, lambda e: e.update({"9" * 30: {"logprob": -0.9}})), "not by token id"),
    "words": (at(4, lambda e: e.update({"the": {"logprob": -0.9}})), "not by token id"),
    "flat": (at(4, lambda e: e.update({"5": -0.9})), "not by token id"),
    "list": (changed(lambda es: es.__setitem__(4, [1])), "positions are no mappings"),
    "mapping": (with_choice(lambda c: c.update(prompt_logprobs={"a": 1})), "that are no list"),
    "gone": (with_choice(lambda c: c.pop("prompt_logprobs")), "has no prompt_logprobs, which an earlier one had"),
    "no choices": (send_whole({"object": "x"}), "no choices"),
    "two choices": (scoring(lambda _h, _b, v: {"choices": v["choices"] * 2}), "2 choices"),
    "another index": (with_choice(lambda c: c.update(index=1)), "belongs to another prompt"),
    "index true": (with_choice(lambda c: c.update(index=False)), "belongs to another prompt"),
    "array": (send_whole([]), "is a JSON list"),
    "error in 200": (send_whole({"error": {"message": "x"}}), "no choices"),
    "redirect": (scoring(lambda h, _b, _v: h.send({}, 307, Location="http://192.0.2.1/")), "redirect, HTTP 307"),
    "packed": (scoring(lambda h, _b, v: h.send(v, Content_Encoding="gzip")), "in the encoding gzip"),
    "huge": (scoring(huge), "larger than the .* bytes"),
    "400": (scoring(lambda h, _b, _v: h.send({"detail": "bad \x1b[31m\nline"}, 400)), r"HTTP 400 \(bad \[31m line\)"),
    "418": (scoring(lambda h, _b, _v: h.send({}, 418)), "answers HTTP 418"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_refused_at_once_in_one_line(make, server, name):
    server.script.answer, says = copy.copy(WRONG[name])
    with pytest.raises(KdkitError, match=says) as error:
        make(timeout=60.0).signals(collate(ROWS[:1]))
    assert int(error.value.exit_code) == 1
    assert str(error.value).startswith(f"{server.url}/completions: ")
    assert "\n" not in str(error.value)
    assert sum(isinstance(body["prompt"], list) for body in server.script.requests) <= (3 if name == "integer" else 1)


def test_wrong_echoes_are_refused(make, server):
    def broken(edit):
        def answer(_handler, body):
            value = right(body)
            value["choices"][0].pop("prompt_logprobs", None)
            if "logprobs" in body and isinstance(body["prompt"], list):
                edit(value["choices"][0]["logprobs"])
            return value

        return answer

    for edit, says in (
        (lambda x: x["tokens"].reverse(), "another token"),
        (lambda x: x["tokens"].pop(), "different lengths"),
        (lambda x: x["top_logprobs"].__setitem__(4, [1]), "no mappings"),
        (lambda x: x["token_logprobs"].__setitem__(4, "x"), "has a str"),
        (lambda x: x.update(tokens=3), "without tokens"),
    ):
        server.script.answer = broken(edit)
        with pytest.raises(StageError, match=says):
            make().signals(collate(ROWS[:1]))


def test_one_wrong_answer_ends_the_others(make, server):
    def answer(_handler, body, value):
        if body["prompt"][0] == 20:
            value["choices"] = []
        return value

    server.script.answer = scoring(answer)
    with pytest.raises(StageError, match="0 choices"):
        make().signals(pack(ROWS))


@pytest.mark.parametrize("host", ["a..b", "xn--a", "a" * 64])
def test_an_address_without_a_host_is_one_line(make, host):
    with pytest.raises(RecipeError, match="names no host"):
        make(base_url=f"http://{host}/v1")


def test_log_probabilities_are_asked_for_at_temperature_one(make, server):
    make().signals(pack(ROWS))
    assert {body["temperature"] for body in server.script.requests} == {1}


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({}, None),
        ({"fingerprint": "abc"}, "fingerprint abc"),
        ({"root": "/models/a\n", "fingerprint": 5}, "root /models/a"),
    ],
)
def test_what_a_server_says_about_the_weights_is_kept(make, server, entry, told):
    server.script.models = {"data": [{"id": "m", **entry}]}
    assert make().identity() == told


# --- the key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_the_environment_and_stays_secret(make, server, status):
    server.script.models = lambda h: h.send({"error": {"message": f"bad key {h.headers['Authorization']}"}}, status)
    with pytest.raises(EnvironmentUnmet) as error:
        make(api_key_env="TEACHER_KEY").generate(SAY, Sampling(), 0)
    assert "the key in TEACHER_KEY is refused" in str(error.value)
    assert "***" in str(error.value)
    assert KEY not in str(error.value)
    with pytest.raises(EnvironmentUnmet, match=r"a key is wanted.*name its variable as api_key_env"):
        make().generate(SAY, Sampling(), 0)


@pytest.mark.parametrize(
    ("address", "shown"),
    [("http://192.0.2.1:8000/v1", True), ("https://192.0.2.1/v1", False), ("http://127.0.0.1:1/v1", False)],
)
def test_a_key_that_others_can_read_is_said(make, address, shown):
    said = make(base_url=address, api_key_env="TEACHER_KEY").context.lines
    assert said == ([f"{address} is no https address: others on the way can read the key"] if shown else [])
    assert make(base_url=address).context.lines == []


def test_the_key_is_sent_to_this_server_only(make, server):
    make(api_key_env="TEACHER_KEY").generate(SAY, Sampling(), 0)
    assert {h["Authorization"] for h in server.script.headers} == {f"Bearer {KEY}"}
    server.script.headers.clear()
    make().generate(SAY, Sampling(), 0)
    assert not any("Authorization" in h for h in server.script.headers)


@pytest.mark.parametrize(("value", "says"), [(None, "is not set"), (" ", "is not set"), ("sk-a\nb", "is no key")])
def test_what_is_no_key_is_named_by_its_variable(make, monkeypatch, value, says):
    monkeypatch.delenv("TEACHER_KEY")
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(EnvironmentUnmet, match=says) as error:
        make(api_key_env="TEACHER_KEY")
    assert "sk-a" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("api_key_env", KEY),
        ("base_url", f"http://user:{KEY}@host/v1"),
        ("base_url", f"http://host/v1?key={KEY}"),
        ("base_url", "ftp://host/v1"),
        ("base_url", "host:8000"),
        ("base_url", "http://host:99999/v1"),
        ("base_url", "http://ho st/v1"),
        ("top_k", 513),
        ("top_k", "all"),
        ("concurrency", 0),
    ],
)
def test_parameters_that_cannot_be_right(make, field, value):
    with pytest.raises(ValidationError) as error:
        make(**{field: value})
    assert KEY not in "".join(item["msg"] for item in error.value.errors())


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_prompts(make, server):
    def answer(_handler, body):
        time.sleep(0.05 if body["messages"][-1]["content"].endswith("0") else 0)
        return right(body)

    server.script.answer = answer
    said = make().generate(SAY, Sampling(max_new_tokens=33), 0)
    assert [item.text for item in said] == [f"answer to question {i}" for i in range(4)]
    assert not any(item.truncated for item in said)
    assert all(item.token_ids for item in said)
    assert {body["max_tokens"] for body in server.script.requests} == {33}
    assert {body["temperature"] for body in server.script.requests} == {0}
    assert not any({"seed", "top_k", "top_p"} & set(body) for body in server.script.requests)


def test_sampling_is_passed_on_with_a_seed_of_its_own(make, server):
    how = Sampling(do_sample=True, temperature=0.7, top_p=0.9, top_k=40)
    make().generate(SAY, how, 2**63 - 2)
    seeds = {body["messages"][-1]["content"]: body["seed"] for body in server.script.requests}
    assert seeds == {"question 0": 2**63 - 2, "question 1": 2**63 - 1, "question 2": 0, "question 3": 1}
    assert {(b["temperature"], b["top_p"], b["top_k"]) for b in server.script.requests} == {(0.7, 0.9, 40)}


def test_raw_text_is_completed_as_it_is(make, server):
    (said,) = make().generate([Example(id="x", prompt="Once")], Sampling(), 0)
    assert said.text == "more of Once"
    assert server.script.requests[0]["prompt"] == "Once"


def chat(content, reason):
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": reason}
    return lambda _handler, _body: {"choices": [choice]}


@pytest.mark.parametrize(
    ("content", "reason", "text", "truncated"),
    [
        ("half", "length", "half", True),
        ("whole", "stop", "whole", False),
        ("part", "content_filter", "part", True),
        (None, "tool_calls", "", True),
        ("", "stop", "", False),
    ],
)
def test_only_answers_that_ended_by_themselves_are_whole(make, server, content, reason, text, truncated):
    server.script.answer = chat(content, reason)
    (said,) = make().generate(SAY[:1], Sampling(), 0)
    assert (said.text, said.truncated) == (text, truncated)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (chat(None, "stop"), "no text"),
        (chat("x", None), "no finish_reason"),
        (chat(["x"], "stop"), "no text"),
        (chat("\ud800", "stop"), "not valid Unicode"),
        (lambda _h, _b: {"choices": [{"index": 0, "message": "x", "finish_reason": "stop"}]}, "no text"),
        (lambda h, _b: h.send_bytes(b" " * (2**20 + 513 * 4)), "larger than"),
    ],
)
def test_answers_of_the_wrong_kind_are_refused(make, server, answer, says):
    server.script.answer = answer
    with pytest.raises(StageError, match=says):
        make().generate(SAY[:1], Sampling(max_new_tokens=4), 0)


def test_numbers_stay_as_precise_as_they_came(make, server):
    exact = [-0.12345678, -3.0000002, -5.25, -7.125]

    def edit(entries):
        for item in entries[1:]:
            for entry, value in zip(item.values(), exact, strict=False):
                entry["logprob"] = value

    server.script.answer = changed(edit)
    _, logprobs = everything(make().signals(collate(ROWS[:1])))
    np.testing.assert_array_equal(logprobs[0].numpy(), np.array(exact, np.float32))


def test_the_environment_has_no_say_for_this_machine(make, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://192.0.2.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://192.0.2.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert os.environ["HTTP_PROXY"]
    assert len(make().generate(SAY, Sampling(), 0)) == 4
