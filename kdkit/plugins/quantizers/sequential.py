"""GPTQ over a whole model: block after block, each on what the quantised blocks before it hand over.

Memory holds the model as it was loaded, one block in the precision of the work, what its finished layers put out (see
``block_pass.KEPT_BYTES``), the second moments of one input and the hidden states of all calibration tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from kdkit.api.errors import DataError, ModelError, Stopped
from kdkit.models.quantized.layers import blocks
from kdkit.plugins.quantizers.block_pass import BlockPass
from kdkit.plugins.quantizers.calls import Call, batches, head_inputs, plan_of, trace
from kdkit.plugins.quantizers.finished import Finished, LayerFigures
from kdkit.plugins.quantizers.gptq_solver import SolverSettings, solve_shared
from kdkit.plugins.quantizers.hessian import Hessian

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdkit.api import StageContext
    from kdkit.models.quantized.linear import QuantizedLinear

__all__ = ["Sequential", "SequentialSettings"]

_HEAD: Final = "output projection"


@dataclass(frozen=True, slots=True)
class SequentialSettings:
    """How a model is quantised.

    Attributes:
        solver: How a layer is.
        true_sequential: Inside a block, too, a layer's inputs come from the quantised layers before it; otherwise from
            the block's original ones.
        compute: Precision of the forward passes.
        device: Where the work is done.
        identity: Whatever else the result depends on: weights.
    """

    solver: SolverSettings
    true_sequential: bool
    compute: torch.dtype
    device: str
    identity: str


class Sequential:
    """One model on its way. It is used up: blocks that are done give their memory back.

    Args:
        model: In evaluation mode on the host, in any precision: weights are solved as they are, in float32.
        linears: The layers to quantise, as ``kdkit.models.quantized.layers.quantizable`` gives them.
        rows: Calibration rows as token ids.
        settings: See :class:`SequentialSettings`.
        ctx: Progress, the wish to stop, and where finished blocks are kept.

    Raises:
        DataError: There is no row.
        ModelError: The model cannot be quantised block by block.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        linears: Mapping[str, nn.Linear],
        rows: Sequence[Sequence[int]],
        settings: SequentialSettings,
        ctx: StageContext,
    ) -> None:
        if not rows or not all(rows):
            raise DataError("calibration needs rows, and none of them empty")
        self._model, self._linears, self._settings, self._ctx = model, linears, settings, ctx
        self._blocks = blocks(model)
        self._plans = plan_of(model, self._blocks, linears)
        self._rows = rows
        self.finished = Finished(
            ctx.checkpoints / "gptq", _identity(settings, linears, rows), settings.solver.grid.bits, ctx.log
        )
        self._done = 0

    def run(self) -> list[LayerFigures]:
        """Quantise all layers into ``finished``.

        Returns:
            Figures of every layer, in the order of the model.

        Raises:
            ModelError: Weights, or the inputs of a layer, are not finite; its name is said.
            Stopped: A signal asked for it; finished blocks are kept.
        """
        device = self._settings.device
        modules = [block for _, block in self._blocks]
        inside = {module for block in modules for module in block.modules()}
        for module in self._model.base_model.modules():
            if module not in inside:
                self._place(module)
        self._batches = batches(self._rows, device)
        hidden: list[Tensor] = []
        calls: list[list[Call]] = []
        for batch in self._batches:
            # Nothing else may hold the hidden states: they are replaced block by block.
            states, made = trace(self._model, modules, self._plans, batch.ids)
            hidden.append(states)
            calls.append(made)
        for index, (name, block) in enumerate(self._blocks):
            if self._left(index):
                self._block(index, name, block, hidden, [made[index] for made in calls])
            block.to("meta")
        head = self._head()
        if head is not None and self.finished.figures(_HEAD) is None:
            self._solve_head(head, hidden)
        figures = {f.name: f for name, _ in (*self._blocks, (_HEAD, None)) for f in self.finished.figures(name) or ()}
        return [figures[name] for name in self._linears]

    def _left(self, index: int) -> bool:
        """Whether this block or one after it is not finished, so that its outputs are needed."""
        names = [name for name, _ in self._blocks[index:]] + [_HEAD] * (self._head() is not None)
        return any(self.finished.figures(name) is None for name in names)

    def _head(self) -> str | None:
        """The layer outside of all blocks, if one is to be quantised."""
        planned = {name for plan in self._plans for group in plan.groups for name in group}
        return next((name for name in self._linears if name not in planned), None)

    def _place(self, module: nn.Module) -> None:
        """Parameters in the precision of the work; buffers keep theirs: tables of angles need it."""
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(self._settings.device, self._settings.compute)
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(self._settings.device))

    def _block(self, index: int, name: str, block: nn.Module, hidden: list[Tensor], calls: Sequence[Call]) -> None:
        own = {layer: self._linears[layer] for group in self._plans[index].groups for layer in group}
        sources = {layer: linear.weight.detach() for layer, linear in own.items()}
        for module in block.modules():
            self._place(module)
        passes = BlockPass(block, own, hidden, calls, self._batches)
        if self.finished.figures(name) is None:
            self.finished.add(index, name, self._solve(index, passes, sources))
        else:
            for layer in own:
                self._set(layer, self.finished[layer])
            self._done += len(own)
        passes.advance()
        self._check_stop(f"after {name}")

    def _solve(
        self, index: int, passes: BlockPass, sources: Mapping[str, Tensor]
    ) -> list[tuple[LayerFigures, QuantizedLinear]]:
        groups = self._plans[index].groups
        solved: list[tuple[LayerFigures, QuantizedLinear]] = []
        for stage in [[group] for group in groups] if self._settings.true_sequential else [list(groups)]:
            self._check_stop(f"in {self._blocks[index][0]}")
            sums = passes.second_moments([group[0] for group in stage])
            for group in stage:
                done = self._solve_group(group, [sources[name] for name in group], sums.pop(group[0]))
                for figures, linear in done:
                    self._set(figures.name, linear)
                passes.finish(group)
                solved += done
        return solved

    def _solve_group(
        self, names: Sequence[str], weights: Sequence[Tensor], moments: Hessian
    ) -> list[tuple[LayerFigures, QuantizedLinear]]:
        """Layers with the same inputs."""
        value = moments.value()
        try:
            results = solve_shared([w.to(value.device, value.dtype) for w in weights], value, self._settings.solver)
        except ModelError as error:
            raise ModelError(error.what, where=", ".join(names), allowed=error.allowed, hint=error.hint) from error
        solved = []
        for name, r in zip(names, results, strict=True):
            figures = LayerFigures(name, r.error, r.rtn_error, r.damp, r.kept, r.note)
            self._tell(figures)
            solved.append((figures, r.linear))
        return solved

    def _tell(self, figures: LayerFigures) -> None:
        self._done += 1
        values = {"error": figures.error, "rtn_error": figures.rtn_error, "damp": figures.damp}
        self._ctx.progress(self._done, len(self._linears), **values)
        self._ctx.metrics({f"quantize/{key}": value for key, value in values.items()}, step=self._done)
        if figures.note:
            self._ctx.log(f"{figures.name}: {figures.note}")
        elif not math.isclose(figures.damp, self._settings.solver.damp_percent):
            self._ctx.log(f"{figures.name}: took damping {figures.damp:g}")

    def _set(self, name: str, linear: QuantizedLinear) -> None:
        """Let a layer work with its quantised weight from now on."""
        weight = self._linears[name].weight
        weight.data = linear.dequantized(weight.dtype).to(weight.device)

    def _solve_head(self, name: str, hidden: list[Tensor]) -> None:
        self._check_stop(f"before {name}")
        head, modules = self._linears[name], [block for _, block in self._blocks]
        moments = Hessian.like(hidden[0].new_empty(head.in_features))
        for batch, states in zip(self._batches, hidden, strict=True):
            inputs = head_inputs(self._model, head, modules, self._plans, batch.ids, states).flatten(0, -2)
            moments.add(inputs if batch.real is None else inputs[batch.real])
        self.finished.add(len(self._blocks), _HEAD, self._solve_group([name], [head.weight.detach()], moments))

    def _check_stop(self, where: str) -> None:
        """Raise ``Stopped`` when a signal asked for it and there is something left to do."""
        if self._ctx.stopping() and self._left(0):
            kept = sum(self.finished.figures(name) is not None for name, _ in self._blocks)
            raise Stopped(f"stopped {where}; {kept} of {len(self._blocks)} blocks are finished and kept")


def _identity(settings: SequentialSettings, linears: Mapping[str, nn.Linear], rows: Sequence[Sequence[int]]) -> str:
    facts = {
        "settings": {**asdict(settings), "compute": str(settings.compute)},
        "layers": {name: list(linear.weight.shape) for name, linear in linears.items()},
        "rows": [list(row) for row in rows],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
