"""The base class of rewrite rules, and `apply_rules`.

A rule replaces modules of one class by cheaper, mathematically equal ones. It never changes the original module, whose
weights other modules may share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from moebius_export.network.module_cost import shared_copy


class Rule(ABC):
    """One rewrite. The module's docstring holds the algebra; `check` gives the reason for a refusal."""

    name: ClassVar[str]
    target: type[nn.Module]
    keeps_macs: ClassVar[bool] = False  # the rule never changes how many a call takes, so they are not counted again

    @abstractmethod
    def check(self, module: nn.Module) -> str | None:
        """Why the rewrite would not be exact here, or None where it is."""

    @abstractmethod
    def rewrite(self, module: nn.Module) -> nn.Module:
        """The replacement; `module` stays as it is."""


@dataclass(frozen=True)
class Outcome:
    """How often a rule fired, what it found and left alone as (path, reason), and a call's cost before and after it."""

    name: str
    fired: int
    refused: tuple[tuple[str, str], ...]
    macs: tuple[int, int] | None = None


def apply_rules(
    root: nn.Module, rules: Sequence[Rule], count: Callable[[nn.Module], int] | None = None
) -> tuple[nn.Module, list[Outcome]]:
    """Applies rules in their order. A module that stands in several places is rewritten once and stays shared.

    Args:
        root: a network in eval mode; it stays as it is.
        rules: in order; each sees what the ones before it made.
        count: the cost of a call of the network, for the outcomes; None leaves it out.

    Returns:
        The network and an outcome per rule.

    Raises:
        ValueError: the network is in training mode, where batch norms have no constants to fold.
    """
    if root.training:
        raise ValueError("rewrites are for inference; call eval() first")
    root, outcomes = shared_copy(root), []
    with torch.no_grad():
        before = count(root) if count else 0
        for rule in rules:
            root, outcome = _apply(root, rule)
            if count:
                after = count(root) if outcome.fired and not rule.keeps_macs else before
                outcome, before = replace(outcome, macs=(before, after)), after
            outcomes.append(outcome)
    return root.eval(), outcomes


def _apply(root: nn.Module, rule: Rule) -> tuple[nn.Module, Outcome]:
    made: dict[int, nn.Module] = {}
    refused = []
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if type(module) is not rule.target:
            continue
        if id(module) not in made:
            if reason := rule.check(module):
                refused.append((path, reason))
                continue
            made[id(module)] = rule.rewrite(module)
        if path:
            root.set_submodule(path, made[id(module)])
        else:
            root = made[id(module)]
    return root, Outcome(rule.name, len(made), tuple(refused))
