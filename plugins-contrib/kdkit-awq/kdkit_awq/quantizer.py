"""From a model directory and calibration rows to a checkpoint with scaled and rounded weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdkit.api import KdkitError, ModelError, QuantizedInfo, Stopped
from kdkit.models.files import write_errors
from kdkit.models.pretrained import read_model
from kdkit.models.quantized.checkpoint import GptqFormat, check_source, copy_companions, write_checkpoint
from kdkit.models.quantized.form import refuse_quantized
from kdkit.models.quantized.grid import GridSettings, resolve_group_size
from kdkit.models.quantized.layers import blocks, quantizable
from kdkit.models.quantized.linear import QuantizedLinear, round_to_nearest
from kdkit.models.quantized.tensors import Entry, StoredTensors, write_shards
from kdkit_awq.carriers import Group, groups_of
from kdkit_awq.inputs import Inputs, watch_inputs
from kdkit_awq.rows import calibration_rows, check_tokens
from kdkit_awq.search import lost_output, search

if TYPE_CHECKING:
    from kdkit.api import Example, StageContext
    from kdkit_awq.plugin import AwqParams

__all__ = ["AwqQuantizer"]

_EXACT: Final = 1e-3
_LOOKED_AT: Final = 64


class AwqQuantizer:
    """See :class:`kdkit.api.Quantizer` and ``AwqParams``."""

    def __init__(self, params: AwqParams) -> None:
        self._params = params

    def quantize(
        self, model_dir: Path, calibration: Sequence[Example], out_dir: Path, ctx: StageContext, /
    ) -> QuantizedInfo:
        """Write a GPTQ checkpoint to ``out_dir``, which must not exist.

        Raises:
            DataError: No calibration row is left, or a token is unknown to the model.
            ModelError: The model is quantised already, has layers that cannot be, or a width that the group size does
                not divide.
            EnvironmentUnmet: The disk is full.
            Stopped: A signal asked for it; nothing is kept.
        """
        p = self._params
        refuse_quantized(model_dir)
        rows = calibration_rows(calibration, model_dir, max_length=p.max_length, log=ctx.log)
        model = read_model(model_dir, dtype=torch.float32)
        check_tokens(rows, model)
        linears = quantizable(model, lm_head=False)
        size = resolve_group_size(p.group_size, [linear.in_features for linear in linears.values()])
        check_source(model_dir, linears, bits=p.bits)
        ctx.log(f"{len(linears)} layers, {p.bits} bits, groups of {'a whole row' if size == -1 else size}")
        work = _Work(model.to(ctx.device), model_dir, rows, p, size, ctx)
        work.run()
        form = GptqFormat.standard(bits=p.bits, group_size=size, sym=p.sym)
        written = _write(model_dir, out_dir, work, form, ctx.checkpoints)
        ctx.log(work.summary())
        return QuantizedInfo(
            bits=p.bits,
            group_size=size,
            bytes_on_disk=written,
            layer_errors=work.errors,
            rtn_errors=work.nearest,
            kept_rtn=[name for name in linears if name not in work.scales],
            notes=[f"{len(work.scales)} of {len(linears)} layers have scales; the layout is GPTQ's"],
        )


@dataclass(slots=True)
class _Work:
    """A model on its way: scales are folded into it block by block.

    Attributes:
        total: How many layers there are.
        finished: Rounded layers by name.
        changed: Tensors in float32 that are no layers of their own (norms, biases), by their names in the files.
        scales: [width] by which the columns of a layer were multiplied, where they were.
        errors: What of the outputs of each layer is lost.
        nearest: The same, had it been rounded to nearest.
    """

    model: PreTrainedModel
    source: Path
    rows: Sequence[Tensor]
    params: AwqParams
    group_size: int
    ctx: StageContext
    total: int = 0
    finished: dict[str, QuantizedLinear] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    nearest: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Find scales, fold them and round, block after block.

        Raises:
            ModelError: Folding changed what the model computes, or a layer cannot be rounded; its name is said.
            Stopped: A signal asked for it.
        """
        linears = quantizable(self.model, lm_head=False)
        self.total = len(linears)
        with StoredTensors(self.source) as stored:
            names = frozenset(stored.names)
        groups = groups_of(self.model, blocks(self.model), linears, names)
        inputs = self._inputs([group.names[0] for block in groups for group in block], linears)
        logits = self._logits()
        for block in groups:
            self._block(block, linears, inputs)
        gap = float((self._logits() - logits).norm() / logits.norm())
        if not gap <= _EXACT:
            raise ModelError(f"with scales it computes something else (by {gap:.1%})", where=type(self.model).__name__)

    def summary(self) -> str:
        """One line for the log."""
        lost, nearest = (sum(of.values()) / len(of) for of in (self.errors, self.nearest))
        return f"lost output energy: {lost:.2%} of a layer's on average, {nearest:.2%} rounded to nearest"

    def _inputs(self, readers: Sequence[str], linears: Mapping[str, nn.Linear]) -> dict[str, Inputs]:
        found: dict[str, Inputs] = watch_inputs(
            self.model,
            {name: linears[name] for name in readers},
            self.rows,
            keep=self.params.search_tokens,
            seed=self.ctx.seed_for("awq"),
            bf16=self.ctx.precision("auto") == "bf16",
            after_row=lambda: self._check_stop("while the inputs of layers were measured"),
        )
        return found

    def _logits(self) -> Tensor:
        row = max(self.rows, key=len)[:_LOOKED_AT].to(self.model.device)
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=row.unsqueeze(0), use_cache=False).logits
        return logits.double()

    def _block(self, groups: Sequence[Group], linears: Mapping[str, nn.Linear], inputs: Mapping[str, Inputs]) -> None:
        """Scales of all groups first: they also divide the rows of layers inside the block."""
        weights = {name: linears[name].weight.detach().clone() for group in groups for name in group.names}
        samples = {name: self._sample(inputs[group.names[0]]) for group in groups for name in group.names}
        divided: dict[str, Tensor] = {}
        for group in groups:
            self._check_stop(f"before {group.names[0]}")
            scale = self._scale(group, weights, inputs[group.names[0]].size, samples[group.names[0]])
            if scale is not None and group.carrier is not None:
                divided[group.carrier.name] = scale
                self._fold(group, linears, scale)
        for name, weight in weights.items():
            self._round(name, weight, linears[name].weight.detach(), samples[name], divided.get(name))

    def _sample(self, inputs: Inputs) -> Tensor:
        return inputs.sample.to(self.model.device)

    def _scale(self, group: Group, weights: Mapping[str, Tensor], size: Tensor, sample: Tensor) -> Tensor | None:
        """The best scale of a group; None where rounding to nearest is as good, or nothing carries another."""
        if group.carrier is None:
            return None
        scale, alpha = search(
            [weights[name] for name in group.names],
            size.to(self.model.device),
            sample,
            steps=self.params.steps,
            exact=group.carrier.exact,
            rounded=lambda weight: self._rounded(group.names[0], weight),
        )
        return scale if alpha else None

    def _fold(self, group: Group, linears: Mapping[str, nn.Linear], scale: Tensor) -> None:
        """Let the carrier divide by ``scale`` and the readers multiply by it."""
        assert group.carrier is not None
        for key, value in group.carrier.divided(scale).items():
            getattr(group.carrier.module, key).data = value
            full = f"{group.carrier.name}.{key}"
            if not (group.carrier.form == "rows" and key == "weight"):
                self.changed[full] = value.cpu()
        for name in group.names:
            self.scales[name] = scale
            linears[name].weight.data = linears[name].weight.data * scale

    def _round(self, name: str, before: Tensor, folded: Tensor, sample: Tensor, rows: Tensor | None) -> None:
        linear = self._rounded(name, folded)
        ones = torch.ones_like(before[0])
        self.errors[name] = lost_output(before, linear, sample, self.scales.get(name, ones), rows)
        self.nearest[name] = lost_output(before, self._rounded(name, before), sample, ones)
        self.finished[name] = QuantizedLinear(
            linear.codes.cpu(), linear.scales.cpu(), linear.zeros.cpu(), linear.g_idx.cpu(), linear.bits
        )
        values = {"error": self.errors[name], "rtn_error": self.nearest[name]}
        self.ctx.progress(len(self.finished), self.total, **values)
        self.ctx.metrics({f"quantize/{key}": value for key, value in values.items()}, step=len(self.finished))

    def _rounded(self, name: str, weight: Tensor) -> QuantizedLinear:
        grid = GridSettings(bits=self.params.bits, sym=self.params.sym, mse=0.0)
        try:
            return round_to_nearest(weight, grid, self.group_size)
        except KdkitError as error:
            raise ModelError(error.what, where=name, allowed=error.allowed, hint=error.hint) from error

    def _check_stop(self, where: str) -> None:
        if self.ctx.stopping():
            raise Stopped(f"stopped {where}; the search starts again from the beginning")


def _write(model_dir: Path, out_dir: Path, work: _Work, form: GptqFormat, scratch: Path) -> int:
    """Write the model with scales into a directory that is thrown away, and the checkpoint from it."""
    with write_errors(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="awq-", dir=scratch) as name:
            scaled = Path(name)
            with StoredTensors(model_dir) as stored:
                write_shards([_entry(stored, tensor, work.changed) for tensor in stored.names], scaled)
            shutil.copyfile(model_dir / "config.json", scaled / "config.json")
            copy_companions(model_dir, scaled)
            return write_checkpoint(scaled, out_dir, work.finished, form, write_head=False)


def _entry(stored: StoredTensors, name: str, changed: Mapping[str, Tensor]) -> Entry:
    """A tensor of the model, as it is or as folding has changed it; weights of layers are never read from here."""
    size = 4
    for extent in stored.shape(name):
        size *= extent
    return Entry(size, lambda: {name: changed[name].contiguous() if name in changed else stored.read(name)})
