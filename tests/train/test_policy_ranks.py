"""Two processes: one judges, both learn from the same rollouts."""

from __future__ import annotations

import os
import queue
import socket

import pytest
import torch
from accelerate import PartialState
from test_grpo_rollouts import rollouts

from kdkit.api import RewardScore
from kdkit.api.errors import StageError
from kdkit.train.policy.ranks import of_first_rank
from kdkit.train.rewards import RewardTerm

WORLD = 2


def _rank(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    PartialState(cpu=True)
    calls = []

    def moody(given):
        """Another verdict in every process, as with a time limit: so other groups are all alike."""
        calls.append(len(given))
        return [RewardScore.of(float((place // 4 + rank) % 2 * (place % 4))) for place, _ in enumerate(given)]

    made, kept, _ = rollouts(terms=[RewardTerm(name="moody", reward=moody)], tries=2)
    rows = made.make(0)

    def fails():
        raise RuntimeError("no luck")

    try:
        of_first_rank(fails)
    except (RuntimeError, StageError) as error:
        failed = str(error)
    results.put((rank, rows, [(record.id, record.total, record.advantage) for record in kept], sum(calls), failed))
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(900)
def test_processes_that_judge_differently_learn_from_the_same_rollouts():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, port, results)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    try:
        found = sorted((results.get(timeout=600) for _ in processes), key=lambda item: item[0])
    except queue.Empty:
        pytest.fail("a process did not answer")
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    (_, rows, kept, calls, error), (_, others, other_kept, other_calls, other_error) = found
    assert rows == others
    assert kept == other_kept
    assert any(row.advantages[0] for row in rows)
    assert calls >= 16
    assert other_calls == 0
    assert error == "no luck"
    assert "the first process failed" in other_error


def test_alone_nothing_is_sent(monkeypatch):
    monkeypatch.setattr("kdkit.train.policy.ranks.broadcast_object_list", None)
    assert of_first_rank(lambda: 3) == 3
