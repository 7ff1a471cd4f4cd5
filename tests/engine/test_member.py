"""What a session asks of the callbacks of a fit."""

from __future__ import annotations

from models import fit, make

from lightning_normdyn import AdaptiveWeightShrink, NormDynamicsMonitor
from lightning_normdyn.engine.member import Member


def test_a_callbacks_part_in_a_fit_answers_all_that_a_session_asks():
    callbacks = [AdaptiveWeightShrink(0.5), NormDynamicsMonitor(1, tables=False)]
    fit(make(), callbacks, max_steps=1)
    asked = {name for name in vars(Member) if not name.startswith("_")}
    asked |= set(Member.__annotations__)
    for callback in callbacks:
        assert all(hasattr(callback.member, name) for name in asked)
        assert callback.member in callback.member.session.members
