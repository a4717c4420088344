"""Training without dropout, for policies.

A ratio q / q_old compares two forward passes of the same model. With dropout in one of them, or in both, it would be
off from one before anything was learned: the difference between two masks would be taken for a change of the policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.nn.modules.dropout import _DropoutNd

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["without_dropout"]


@contextmanager
def without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """Every dropout probability of ``model`` is 0 meanwhile, also in training mode, which gradient checkpointing needs.

    That is ``p`` of dropout modules, and every number whose name has "drop" in a module (attention dropout, layer drop,
    drop path) or in its configuration, which some attentions read. All are put back, so that the model is saved as it
    came; save it afterwards.
    """
    changed: list[tuple[Any, str, Any]] = []
    configs: dict[int, Any] = {}
    for module in model.modules():
        changed += [(module, name, value) for name, value in _probabilities(module)]
        config = getattr(module, "config", None)
        if config is not None:
            configs[id(config)] = config
    for config in configs.values():
        changed += [(config, name, value) for name, value in _probabilities(config)]
    try:
        for owner, name, value in changed:
            setattr(owner, name, type(value)(0))
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _probabilities(owner: Any) -> list[tuple[str, Any]]:
    """Names and values of the probabilities of an object that are not 0."""
    names = {"p"} if isinstance(owner, _DropoutNd) else set()
    return [
        (name, value)
        for name, value in vars(owner).items()
        if (name in names or "drop" in name.lower()) and isinstance(value, int | float) and value and value is not True
    ]
