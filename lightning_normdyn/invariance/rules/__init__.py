"""How a scale passes single operations: a rule for each kind of autograd node.

Importing any part of this package fills `RULES`, so that a rule that a user registers later
replaces one of ours.
"""

from . import (  # noqa: F401
    elementwise,
    indexing,
    linear,
    reductions,
    views,
)
from .operation import Operation, register_rule

__all__ = ["Operation", "register_rule"]
