from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest_train import make_rows
from test_objective import TERMS, Teacher, assert_same, reference
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kdkit.models.chat import Encoded
from kdkit.models.heads import split
from kdkit.testing.tiny import tiny_model
from kdkit.train.batching import collate
from kdkit.train.objective import CausalObjective
from kdkit.train.packing import isolates, pack, unpack

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "initializer_range": 0.2,
}


def model_of(kind, **changes):
    torch.manual_seed(0)
    settings = {**SMALL, **changes}
    if kind == "gpt2":
        settings = {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
        settings |= {"eos_token_id": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings, pad_token_id=0)).double().eval()


def step(model, teacher, rows, parts):
    model.zero_grad()
    objective = CausalObjective(model, TERMS)
    scale, loss = 1 / sum(row.targets for row in rows), 0.0
    for part in parts:
        batch = pack(part)
        measured = objective(batch, teacher(batch), scale)
        measured.loss.backward()
        loss += float(measured.loss.detach())
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "rtol"),
    # Gemma 2 takes the softmax of its attention in float32 whatever its weights are.
    [("llama", 1e-9), ("qwen2", 1e-9), ("gpt2", 1e-9), ("gemma2", 1e-5)],
)
@pytest.mark.parametrize("cuts", [1, 2, 8])
def test_packed_gradient_is_the_unpacked_gradient(kind, rtol, cuts):
    model, teacher, rows = model_of(kind), tiny_model(seed=1).double(), make_rows(8)
    want = reference(model, teacher, rows)
    model.train()
    parts = [rows[i::cuts] for i in range(cuts)]
    assert_same(step(model, Teacher(teacher), rows, parts), want, rtol=rtol)


def test_a_sliding_window_counts_within_the_document():
    model = model_of("gemma2", sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    rows = make_rows(6)
    want = reference(model, tiny_model(seed=1).double(), rows)
    assert_same(step(model, Teacher(tiny_model(seed=1).double()), rows, [rows]), want, rtol=1e-5)


class Forgetful(nn.Module):
    """A trunk that ignores position ids, as recurrent models do: packed rows run into each other."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def get_input_embeddings(self):
        return self.trunk.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False):
        del position_ids
        return self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_isolation_is_measured(dtype):
    trunk = split(tiny_model().to(dtype)).trunk.train()
    assert isolates(trunk)
    assert trunk.training
    assert not isolates(Forgetful(trunk))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [1e-2, 0.0])
def test_a_faint_leak_is_a_leak(dtype, gate):
    """A convolution over tokens whose weights are still close to zero, or zero: training will use it."""

    class Leaky(nn.Module):
        def __init__(self, trunk):
            super().__init__()
            self.trunk, self.conv = trunk, nn.Conv1d(32, 32, 3, padding=2, dtype=dtype)

        def get_input_embeddings(self):
            return self.trunk.get_input_embeddings()

        def forward(self, **inputs):
            out = self.trunk(**inputs)
            mixed = self.conv(out.last_hidden_state.mT)[..., :-2].mT
            return SimpleNamespace(last_hidden_state=out.last_hidden_state + gate * mixed)

    assert not isolates(Leaky(split(tiny_model().to(dtype)).trunk))


def test_a_faint_leak_without_a_convolution_is_measured():
    class Leaky(Forgetful):
        def forward(self, input_ids, position_ids=None, use_cache=False):
            out = self.trunk(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache).last_hidden_state
            return SimpleNamespace(last_hidden_state=out + 1e-4 * out.cumsum(dim=1))

    assert not isolates(Leaky(split(tiny_model()).trunk))


@pytest.mark.parametrize("kind", ["conv", "linear_attention", "mamba"])
def test_layers_that_are_no_attention_are_refused_by_name(kind):
    trunk = split(tiny_model()).trunk
    trunk.config.layer_types = ["full_attention", kind]
    assert not isolates(trunk)


def test_measuring_leaves_every_module_in_its_mode():
    trunk = split(tiny_model()).trunk.train()
    trunk.layers[0].eval()
    before = [module.training for module in trunk.modules()]
    assert isolates(trunk)
    assert [module.training for module in trunk.modules()] == before


def test_packed_rows_stay_within_the_positions_of_the_model():
    rows = [Encoded(str(i), (1,) * n, (True,) * n) for i, n in enumerate([1900, *[300] * 7])]
    assert pack(rows).input_ids.shape[1] > 2048 >= pack(rows, limit=2048).input_ids.shape[1]
    assert pack(rows, limit=64).input_ids.shape[1] == 1900


def test_many_rows_are_laid_out_at_once():
    rows = [Encoded(str(i), (1,) * (50 + i % 200), (True,) * (50 + i % 200)) for i in range(2000)]
    batch = pack(rows)
    assert batch.input_ids.numel() < 1.05 * sum(len(row.ids) for row in rows)


def test_a_trunk_that_takes_no_position_ids_does_not_isolate():
    trunk = split(tiny_model()).trunk
    trunk.forward = lambda input_ids, use_cache: None
    assert not isolates(trunk)


def test_a_student_that_leaks_gets_padded_rows():
    model, teacher, rows = tiny_model().double().train(), tiny_model(seed=1).double(), make_rows(8)
    want = reference(model, teacher, rows)
    objective = CausalObjective(model, TERMS)
    assert objective.isolates()
    objective._isolates = False
    seen = []
    objective._parts.trunk.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model.zero_grad()
    batch = pack(rows)
    measured = objective(batch, Teacher(teacher)(batch), 1 / sum(row.targets for row in rows))
    measured.loss.backward()
    got = float(measured.loss.detach()), {name: p.grad for name, p in model.named_parameters()}
    assert_same(got, want, rtol=1e-9)
    assert seen[0].shape[0] == len(rows)


def test_packed_rows_hold_every_token_once_and_start_at_position_zero():
    rows = make_rows(7)
    batch = pack(rows)
    tokens = sorted(token for row in rows for token in row.ids)
    filler = batch.input_ids.numel() - len(tokens)
    assert sorted(batch.input_ids.flatten().tolist()) == sorted([0] * filler + tokens)
    assert sorted(batch.example_ids) == sorted(row.id for row in rows)
    assert batch.attention_mask is None
    assert int((batch.position_ids == 0).sum()) == len(rows) + filler
    assert not batch.labels_mask[batch.position_ids == 0].any()
    assert int(batch.labels_mask.sum()) == sum(row.targets for row in rows)


def test_a_document_is_not_learned_from_its_neighbour():
    batch = pack([Encoded("a", (1, 2), (True, True)), Encoded("b", (3, 4), (True, True))])
    assert batch.labels_mask.sum() == 2


def test_unpack_keeps_learned_tokens_in_order():
    rows = [*make_rows(6), Encoded("silent", (1, 2, 3), (False,) * 3)]
    packed = pack(rows)
    padded = unpack(packed)
    assert padded.input_ids[padded.labels_mask].tolist() == packed.input_ids[packed.labels_mask].tolist()
    assert padded.attention_mask.sum() == sum(len(row.ids) for row in rows[:6])
    assert padded.position_ids.max() + 1 == padded.input_ids.shape[1] == max(len(row.ids) for row in rows[:6])
    assert padded.example_ids == ()  # a row from which nothing is learned cannot be told from what fills a row
    kept = collate(rows)
    assert unpack(kept) is kept


def test_unpack_keeps_the_ids_of_its_rows():
    rows = make_rows(9)
    lengths = {row.id: len(row.ids) for row in rows}
    packed = pack(rows)
    padded = unpack(packed)
    assert padded.example_ids == packed.example_ids
    assert padded.attention_mask.sum(1).tolist() == [lengths[name] for name in padded.example_ids]


def test_a_batch_without_learned_tokens_can_be_unpacked():
    assert unpack(pack([Encoded("a", (1, 2, 3), (False,) * 3)])).input_ids.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ([10] * 8, (8, 10)),  # nothing to gain
        ([60, *[10] * 7], (1, 130)),  # short rows: nothing is padded
        ([600, *[100] * 7], (2, 700)),
        ([4000, 4000], (2, 4000)),  # long rows: attention would cost more than it saves
        ([5], (1, 5)),
    ],
)
def test_layout(lengths, shape):
    rows = [Encoded(str(i), (1,) * n, (True,) * n) for i, n in enumerate(lengths)]
    assert tuple(pack(rows).input_ids.shape) == shape
