"""What loggers and the history are told of a run: settings that are plain, and facts by weight."""

from __future__ import annotations

import json

from models import TARGETS, fit, make

from lightning_normdyn import AdaptiveWeightShrink, NormDynamicsMonitor


def about(*callbacks):
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(make(), [monitor, *callbacks], max_steps=1)
    return monitor.history.meta


def test_every_callback_has_its_settings_and_every_weight_its_facts():
    meta = about(AdaptiveWeightShrink(0.5, params=TARGETS[0]))
    assert list(meta["callbacks"]) == ["NormDynamicsMonitor", "AdaptiveWeightShrink"]
    assert meta["callbacks"]["AdaptiveWeightShrink"]["alpha"] == 0.5
    assert meta["callbacks"]["AdaptiveWeightShrink"]["params"] == [TARGETS[0]]
    shrunk, other = (meta["targets"][name] for name in TARGETS)
    assert shrunk["scale_invariant"] == "filter"
    assert shrunk["vectors"] == shrunk["shape"][0]
    assert shrunk["treated"].startswith("AWS")
    assert other["treated"] == ""
    assert json.loads(json.dumps(meta)) == meta


def test_two_callbacks_of_one_class_are_told_apart():
    callbacks = [
        AdaptiveWeightShrink(alpha, params=name)
        for alpha, name in zip((0.5, 0.25), TARGETS, strict=True)
    ]
    settings = about(*callbacks)["callbacks"]
    alphas = [each["alpha"] for name, each in settings.items() if "Shrink" in name]
    assert alphas == [0.5, 0.25]


def test_settings_that_json_does_not_know_become_texts():
    class Odd(AdaptiveWeightShrink):
        def settings(self):
            return {"where": complex(1, 2)}

    assert about(Odd(0.5))["callbacks"]["Odd"]["where"] == "(1+2j)"
