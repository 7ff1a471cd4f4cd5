"""Which weights of a model are scale-invariant, and how that is known.

A short path to `lightning_normdyn.invariance.search`; nothing inside the package imports it.
"""

from lightning_normdyn.invariance.graph_rules import register_rule
from lightning_normdyn.invariance.search import (
    InvarianceReport,
    NormLink,
    Verdict,
    inspect_module,
    targets_table,
    verify_scale_invariance,
)

__all__ = [
    "InvarianceReport",
    "NormLink",
    "Verdict",
    "inspect_module",
    "register_rule",
    "targets_table",
    "verify_scale_invariance",
]
