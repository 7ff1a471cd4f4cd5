"""What the papers predict for an optimizer: angular update, norm, relaxation time.

A short path to the modules of `lightning_normdyn.theory`; nothing inside the package imports it.
"""

from lightning_normdyn.theory.course import NormCourse, norm_course
from lightning_normdyn.theory.equilibrium import (
    equilibrium_angular_update,
    equilibrium_norm,
    equivalent_hyperparameters,
    lr_drop_exponent,
    never_settles,
    norm_transient,
    relaxation_steps,
    settles_at,
    wrs_angular_update,
    wrs_direction_lr,
)
from lightning_normdyn.theory.nrq import (
    nrq_concentration,
    nrq_limit_risk,
    nrq_limit_risk_first_order,
    nrq_norm,
)

__all__ = [
    "NormCourse",
    "equilibrium_angular_update",
    "equilibrium_norm",
    "equivalent_hyperparameters",
    "lr_drop_exponent",
    "never_settles",
    "norm_course",
    "norm_transient",
    "nrq_concentration",
    "nrq_limit_risk",
    "nrq_limit_risk_first_order",
    "nrq_norm",
    "relaxation_steps",
    "settles_at",
    "wrs_angular_update",
    "wrs_direction_lr",
]
