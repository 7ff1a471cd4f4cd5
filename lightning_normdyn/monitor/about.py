"""What a run consists of: the settings of every callback, and which weights they treat how."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning_normdyn.engine.session import Session
from lightning_normdyn.engine.target import Target


def about_run(session: Session, targets: Sequence[Target]) -> dict[str, dict[str, Any]]:
    """For loggers and the history's ``meta``, as plain JSON. Every rank must call it.

    Returns:
        ``"callbacks"``: settings by callback; ``"targets"``: facts by weight.
    """
    treatments = session.combined.treatments()
    facts = {}
    for target in targets:
        facts[target.name] = {
            "shape": list(target.verdict.shape),
            "scale_invariant": target.verdict.kind,
            "norms": list(target.verdict.norms),
            "vectors": target.partition.n,
            "treated": treatments[target.weight],
        }
    about = {"callbacks": _settings(session), "targets": facts}
    # To JSON and back: a person's own callback may have settings that JSON does not know, and a
    # resumed run compares these settings with those in its checkpoint, which are JSON, too.
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(about, default=str))
    return plain


def _settings(session: Session) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {}
    for member in session.members:
        rule = member.rule
        name = type(rule).__name__
        # A second callback of the class must not take the first one's place.
        if name in settings:
            name = f"{name}-{len(settings)}"
        common = {"params": rule.params, "granularity": rule.granularity}
        settings[name] = {**common, **rule.settings()}
    return settings


__all__ = ["about_run"]
