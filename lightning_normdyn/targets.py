"""Which weights of a model are scale-invariant, and how that is known.

A short path to what people use of `lightning_normdyn.invariance`; nothing inside the package
imports it.
"""

from lightning_normdyn.invariance.checks import (
    InvarianceReport,
    inspect_module,
    verify_scale_invariance,
)
from lightning_normdyn.invariance.rules import register_rule
from lightning_normdyn.invariance.verdict import NormLink, Verdict, targets_table

__all__ = [
    "InvarianceReport",
    "NormLink",
    "Verdict",
    "inspect_module",
    "register_rule",
    "targets_table",
    "verify_scale_invariance",
]
