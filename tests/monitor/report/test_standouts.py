"""What a reader should look at first: by the monitor's finding, and beside the other layers."""

from __future__ import annotations

import pytest
from histories import reported_run, run_with_three_faults

from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.report.standouts import in_one_sentence, like, standouts
from lightning_normdyn.monitor.report.summary import summaries


def found(history: History):
    return standouts(history, summaries("run", history))


def test_three_planted_faults_are_the_first_three():
    dead, long, fast = found(run_with_three_faults())
    assert [each.layer.name for each in (dead, long, fast)] == [
        "block9.weight",
        "block3.weight",
        "block6.weight",
    ]
    assert (dead.tag, dead.why) == ("no gradient", "no gradient: only decay acts")
    assert dead.facts[0] == "angle under 0.001x"
    # They turn as is to be expected of their length and rate: beside the others one sees it.
    assert long.why == "turns 0.049x as far in a step as the median layer; as expected now (1.0x)"
    assert long.facts == ["angle 0.049x", "norm 19x", "effective LR 0.051x"]
    assert fast.tag == "faster than the others"
    assert fast.facts[2] == "effective LR 10x"
    assert all(each.is_off for each in (dead, long, fast))


def test_a_healthy_run_has_layers_that_are_farthest_and_none_that_is_off():
    history = run_with_three_faults()
    healthy = History()
    healthy.meta["targets"] = {}
    for row in history:
        values = {
            key: value
            for key, value in row.items()
            if "/" in key and not key.endswith(("block3.weight", "block6.weight", "block9.weight"))
        }
        healthy.append(int(row["step"]), values, optimizer_step=int(row["optimizer_step"]))
    layers = found(healthy)
    assert len(layers) == 3
    assert not any(each.is_off for each in layers)


def test_the_finding_of_the_monitor_comes_before_the_words():
    history = reported_run()
    history.meta["targets"] = {
        "conv0.weight": {"finding": "frozen", "ratio": None, "verdict": "frozen: nothing"},
        "conv1.weight": {"finding": "no such finding", "ratio": "?", "verdict": 3},
        "conv2.weight": {"finding": ["?"], "ratio": float("nan")},
    }
    sentence = in_one_sentence(history, summaries("run", history))
    assert sentence == (
        "1 of 3 weights turns as expected; conv2.weight turns 1.5x too fast; conv0.weight does not "
        "move."
    )


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("turns too slow: 0.50x what is expected", "turns too slowly, at 0.50x of what"),
        ("no gradient: only decay acts", "has no gradient"),
        ("collapsing", "has no gradient"),
        ("not finite since step 5", "is not finite any more"),
        ("still growing, 1.4x its balance", "still grows"),
        ("something that nobody knows", "has nothing to be held against"),
    ],
)
def test_a_history_that_keeps_words_alone_is_read_by_how_they_begin(verdict, said):
    history = reported_run(1)
    history.meta["targets"] = {"conv0.weight": {"verdict": verdict}}
    assert said in in_one_sentence(history, summaries("run", history))


def test_few_layers_have_no_median():
    assert all("median" not in each.why for each in found(reported_run(3)))
    assert all(each.facts == [] for each in found(reported_run(3)))


def test_a_head_is_compared_with_heads():
    history = run_with_three_faults()
    history.meta["targets"]["block0.weight"]["scale_invariant"] = "no"
    head, block, *_ = summaries("run", history)
    assert "block0.weight" not in like(block, summaries("run", history))
    # Of a single head, any other layers show whether it stands still.
    assert len(like(head, summaries("run", history))) == 12
