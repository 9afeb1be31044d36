"""Which parameters decay, and how fast each learns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

# Tables that tell places or roles apart: one row of each, whatever their rank, so no decay.
NO_DECAY = (
    "*positional_embedding*",
    "*position_embedding*",
    "*pos_embed*",
    "*class_embedding*",
    "*cls_token*",
    "*query_tokens*",
)
# A numbered block of a transformer: (list, index).
_BLOCK = re.compile(r"^(.*?\b(?:resblocks|blocks|layers|layer|h))\.(\d+)\.")
# What stands before the first block.
_STEM = re.compile(r"embed|conv1|ln_pre|pre_layrnorm|cls_token|\bw[tp]e\b")


@dataclass(frozen=True)
class GroupRules:
    """How :func:`parameter_groups` sorts parameters.

    Attributes:
        weight_decay: for matrices, filters and embedding tables. Parameters of rank 0 and 1 (gains,
            biases, the logit scale) and those that match `no_decay` have none.
        layer_decay: the rate of block i of L (from 0) is lr * layer_decay**(L - i), that of what
            stands before the blocks lr * layer_decay**(L + 1), of what follows lr (BEiT, arXiv
            2106.08254, appendix).
        layer_decay_in: shell patterns of the names that layer decay applies to (those of the image
            encoder, say); blocks of others learn at lr.
        rates: shell pattern of names -> factor of lr; factors of all patterns that match multiply.
        no_decay: shell patterns of names.
    """

    weight_decay: float = 0.0
    layer_decay: float = 1.0
    layer_decay_in: Sequence[str] = ("*",)
    rates: Mapping[str, float] = field(default_factory=dict)
    no_decay: Sequence[str] = NO_DECAY


def parameter_groups(model: nn.Module, lr: float, rules: GroupRules) -> list[dict[str, Any]]:
    """Groups for an optimizer: ``params``, ``names``, ``lr``, ``weight_decay``.

    Frozen parameters are left out. The order follows ``named_parameters``, so an optimizer's state
    fits the groups of a model that is built again.

    Raises:
        ValueError: nothing to train, a pattern of `rates` that matches no trained parameter, or
            layer decay for a model without numbered blocks.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("parameter_groups: the model has no parameter that requires a gradient")
    for pattern in rules.rates:
        if not any(fnmatchcase(name, pattern) for name in trained):
            raise ValueError(f"parameter_groups: no trained parameter matches rates[{pattern!r}]")
    factors = _layer_factors(model, rules.layer_decay, rules.layer_decay_in)

    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trained.items():
        plain = parameter.ndim <= 1 or any(fnmatchcase(name, p) for p in rules.no_decay)
        decay = 0.0 if plain else rules.weight_decay
        rate = lr * factors.get(name, 1.0)
        for pattern, factor in rules.rates.items():
            rate *= factor if fnmatchcase(name, pattern) else 1.0
        empty: dict[str, Any] = {"params": [], "names": [], "lr": rate, "weight_decay": decay}
        group = groups.setdefault((rate, decay), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _layer_factors(model: nn.Module, decay: float, patterns: Sequence[str]) -> dict[str, float]:
    """Name -> factor of the rate, for parameters in or before a list of numbered blocks."""
    if decay == 1.0:
        return {}
    names = [
        name
        for name, _ in model.named_parameters()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if not names:
        raise ValueError(f"parameter_groups: no parameter matches layer_decay_in {list(patterns)}")
    depth: dict[str, int] = {}
    for name in names:
        if match := _BLOCK.match(name):
            depth[match[1]] = max(depth.get(match[1], 0), int(match[2]) + 1)
    if not depth:
        raise ValueError(
            "parameter_groups: layer_decay needs numbered blocks (resblocks.0, layers.0, ...), "
            f"got parameters such as {names[0]}"
        )
    factors = {}
    for name in names:
        if match := _BLOCK.match(name):
            factors[name] = decay ** (depth[match[1]] - int(match[2]))
        elif _STEM.search(name):
            factors[name] = decay ** (depth[_own_blocks(name, list(depth))] + 1)
    return factors


def _own_blocks(name: str, lists: Sequence[str]) -> str:
    """The list of blocks that lies nearest to a parameter in the module tree."""

    def distance(blocks: str) -> tuple[int, int]:
        shared = 0
        for a, b in zip(name.split("."), blocks.split("."), strict=False):
            if a != b:
                break
            shared += 1
        return -shared, len(blocks)

    return min(lists, key=distance)
