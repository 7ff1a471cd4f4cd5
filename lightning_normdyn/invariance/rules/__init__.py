"""How a scale passes single operations: a rule for each kind of autograd node.

Importing any part of this package fills `RULES`, so that a rule that a user registers later
replaces one of ours.
"""

from lightning_normdyn.invariance.rules import (
    elementwise,
    indexing,
    linear,
    normalizations,
    reductions,
    tensor_parallel,
    views,
)
from lightning_normdyn.invariance.rules.operation import Operation
from lightning_normdyn.invariance.rules.registry import register_rule

__all__ = [
    "Operation",
    "elementwise",
    "indexing",
    "linear",
    "normalizations",
    "reductions",
    "register_rule",
    "tensor_parallel",
    "views",
]
