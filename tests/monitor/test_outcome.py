"""What is told of a fit as a whole: settings that are plain, facts by weight, the table at its end,
charts of any length and tables of any text."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from models import TARGETS, fit, loader, make, weights_of
from monitoring import Turns, momentum, monitor

from lightning_normdyn import AdaptiveWeightShrink, NormDynamicsMonitor
from lightning_normdyn.monitor import outcome
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.outcome import Outcome, markdown

pytestmark = pytest.mark.usefixtures("_no_run_left")


def test_charts_are_thinned_to_what_wandb_draws():
    history = History()
    for step in range(400):
        history.append(
            step,
            {f"effective_lr/{i}.weight": 1.0 + step for i in range(160)},
            optimizer_step=step + 1,
        )
    curves = Outcome(history, [], ["effective_lr"]).chart("effective_lr")
    # Sorted as text, they are still in the order of the network.
    assert list(curves) == sorted(curves) == [f"{i + 1:03} {i}.weight" for i in range(160)]
    assert sum(len(steps) for steps, _ in curves.values()) <= 10_000
    for x, y in curves.values():
        assert (x[0], x[-1]) == (0, 399)
        assert y.tolist() == [1.0 + step for step in x]
        assert max(b - a for a, b in pairwise(x)) <= math.ceil(400 / len(x)) + 1


def test_markdown_escapes_what_would_break_a_row():
    assert markdown(
        [{"weight": "a|b", "norm": 0.12345, "prediction": None, "shape": [3, 4]}]
    ).splitlines() == [
        "| weight | norm | prediction | shape |",
        "| --- | --- | --- | --- |",
        r"| a\|b | 0.123 | – | 3, 4 |",
    ]
    assert markdown([]) == ""


def test_the_tables_at_start_and_end(capsys):
    fit(make(make_optimizer=momentum), [NormDynamicsMonitor(1), AdaptiveWeightShrink(0.5)])
    printed = capsys.readouterr().out
    start, end = printed.split("lightning-normdyn: after 8 optimizer steps")
    assert "lightning-normdyn: targets" in start
    for name in (*TARGETS, "net.8.weight"):
        assert name in start
        assert name in end
    assert "AWS" in start
    assert "→" in end


def row_of(name, finding, words, ratio, norm=1.0):
    return {
        "weight": name,
        "treated how": "measured",
        "norm first": norm,
        "norm last": norm,
        "effective lr": 0.1,
        "angular update": 0.01,
        "prediction": None,
        "e-foldings": 2.0,
        "ratio": ratio,
        "finding": finding,
        "verdict": words,
    }


def fine(index, ratio):
    return row_of(f"fine{index}", "as expected", f"as expected now ({ratio}x)", ratio, 1.0 + index)


def fast(index, ratio):
    words = f"turns too fast: {ratio}x what is expected"
    return row_of(f"fast{index}", "too fast", words, ratio)


def test_rows_come_by_health_and_equal_ones_as_one():
    early = row_of("early", "too early", "too few rows", None)
    rows = [early, fine(0, 0.9), fine(1, 1.0), fast(0, 1.8), fine(2, 1.1), fine(3, 1.2)]
    shown = outcome._worst_first(rows)
    assert [row["weight"] for row in shown] == ["fast0", "fine*: 4 weights (medians)", "early"]
    assert shown[1]["verdict"] == "as expected now (0.9 to 1.2x)"
    assert shown[1]["norm first"] == 2.5  # the median
    # Under another rule they are not equal, and three are read as quickly as one.
    rows[1]["treated how"] = "AWS"
    assert len(outcome._worst_first(rows)) == len(rows)


def test_of_many_weights_that_are_wrong_the_worst_are_named():
    rows = [fast(index, 2.0 + index) for index in range(40)]
    rows += [fine(index, 1.0) for index in range(160)]
    shown = outcome._worst_first(rows)
    assert len(shown) == outcome.MOST_ROWS == 20
    assert [row["weight"] for row in shown[:3]] == ["fast39", "fast38", "fast37"]
    more, others = shown[-2:]
    assert more["weight"] == "fast*: 22 more (medians)"
    assert more["verdict"] == "turns too fast: 2.0 to 23.0x what is expected"
    assert others["weight"] == "fine*: 160 weights (medians)"


def test_it_says_where_all_weights_are():
    words = outcome._where_all_are(160, -3, ["table `t` in W&B", "`report runs`"])
    assert words == "All 160 weights one by one: table `t` in W&B; `report runs`."
    words = outcome._where_all_are(160, 5, [])
    assert words.startswith("5 more rows are not shown. All 160 weights one by one: `history`")


def test_a_sentence_above_the_table_sums_it_up(capsys):
    fit(make(make_optimizer=momentum), [NormDynamicsMonitor(1)])
    printed = capsys.readouterr().out
    above, below = printed.split("after 8 optimizer steps\n")[1].split("\n\n", 1)
    assert above.endswith(".")
    assert "weights" in above
    assert below.startswith("weight")


def layers_now(watch):
    """The rows of the end table, with the norms that the weights have at this moment."""
    norms = watch.member.current_norms()
    return watch.member.layers(
        {name: norm for table in norms.values() for name, norm in table.items()}
    )


def test_the_end_table_takes_the_norms_of_every_optimizer_anew():
    watch = monitor(50)
    module = make(Turns, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    fit(module, [watch], loader(20 * 8), max_epochs=1)
    table = {row["weight"]: row for row in layers_now(watch)}
    for name in TARGETS:
        norm = float(weights_of(module)[name].flatten(1).norm(dim=1).mean())
        assert table[name]["norm last"] == pytest.approx(norm, rel=1e-6)
    # In the history too, beside the numbers of the one that stepped last: a weight that does not
    # step keeps its norm.
    assert watch.history[-1]["step"] == 19
    norm = float(weights_of(module)[TARGETS[1]].flatten(1).norm(dim=1).mean())
    assert watch.history[-1][f"weight_norm/{TARGETS[1]}"] == pytest.approx(norm, rel=1e-6)
    assert f"{norm:.3g}" in watch.member.end_table(layers_now(watch))


def test_a_sentence_names_eight_weights_of_those_that_were_clamped():
    assert outcome._clamps_in_words({}) == ""
    words = outcome._clamps_in_words({f"w{i}": 2 for i in range(9)}).replace("\n", " ")
    assert "clamped 18 times" in words
    assert "w7: 2, ...)" in words
    assert "w8" not in words


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
