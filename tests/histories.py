"""Histories that several test modules read, draw and report on."""

from __future__ import annotations

import numpy as np

from lightning_normdyn.monitor.history import History


def filled_history(rows: int = 6, **limits: int) -> History:
    history = History(**limits)
    history.meta = {"targets": [["conv.weight", "BatchNorm"]], "lr": 0.1}
    for step in range(rows):
        values = {"effective_lr/conv.weight": 1.0 / (step + 1), "effective_lr/fc.weight": 2.0}
        if step % 2:
            del values["effective_lr/fc.weight"]
        history.append(10 * step, values, optimizer_step=step + 1)
        history.append_vectors(10 * step, {"weight_norm/conv.weight": np.arange(3) + step})
    history.mark(20, "lr_drop")
    history.mark(30, "rescale", "conv.weight")
    return history


def assert_same_history(one: History, two: History) -> None:
    assert list(one) == list(two)
    assert one.keys() == two.keys()
    assert one.events == two.events
    assert one.meta == two.meta
    assert one.max_rows == two.max_rows
    assert one.vector_names() == two.vector_names()
    for name in one.vector_names():
        for a, b in zip(one.vectors(name), two.vectors(name), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def converging_run(
    layers: int = 3, steps: int = 40, *, predictions: bool = True, seed: int = 0
) -> History:
    """A run whose norms shrink towards an equilibrium; its learning rate drops at 60 %."""
    rng = np.random.default_rng(seed)
    history = History()
    names = [
        f"network.layer{1 + i // 6}.{i % 6 // 2}.conv{1 + i % 2}.weight" for i in range(layers)
    ]
    for step in range(steps):
        lr = 0.1 if step < 0.6 * steps else 0.01
        row = {}
        for i, name in enumerate(names):
            norm = (1 + i / layers) * (0.3 + np.exp(-3 * step / steps))
            row[f"weight_norm/{name}"] = norm
            row[f"effective_lr/{name}"] = lr / norm
            row[f"gradient_cosine/{name}"] = 0.01 * rng.normal()
            row[f"angular_update/{name}"] = np.sqrt(lr * 1e-3) * np.exp(0.1 * rng.normal())
            if predictions:
                row[f"equilibrium_angular_update/{name}"] = np.sqrt(lr * 1e-3)
                row[f"equilibrium_ratio/{name}"] = np.exp(0.1 * rng.normal())
        history.append(10 * step, row, optimizer_step=step + 1)
        history.append_vectors(
            10 * step,
            {
                f"weight_norm/{name}": row[f"weight_norm/{name}"]
                * np.exp(0.1 * rng.normal(size=16))
                for name in names[:2]
            },
        )
        if step % 10 == 0:
            history.mark(10 * step, "rescale")
    history.mark(6 * steps, "lr_drop")
    return history


def run_with_heads(
    kinds: bool, predicted: bool = True, factor: float = 1.0, heads: int = 4
) -> History:
    """Three scale-invariant layers that turn by 0.01, as predicted, and more heads that turn by 1:
    the median of all would be a head's."""
    history = History()
    for step in range(20):
        row = {f"angular_update/conv{i}.weight": 0.01 * factor for i in range(3)}
        row |= {f"angular_update/head{i}.weight": 1.0 for i in range(heads)}
        if predicted and step:  # at step 0 the rate was 0, and nothing was predicted
            row |= {f"equilibrium_angular_update/conv{i}.weight": 0.01 for i in range(3)}
        history.append(step, row, optimizer_step=step + 1)
    if kinds:
        names = [*[f"conv{i}.weight" for i in range(3)], *[f"head{i}.weight" for i in range(heads)]]
        history.meta["targets"] = {
            name: {"scale_invariant": "filter" if name.startswith("conv") else "no"}
            for name in names
        }
    return history


def run_of_underscored_layers() -> History:
    history = History()
    for step in range(3):
        values = {
            f"{q}/_stem{i}.weight": 1.0 + i
            for i in range(3)
            for q in ("effective_lr", "ggd_shape_input", "ggd_shape_parameter")
        }
        history.append(
            step,
            values | {f"input_span_noise/_stem{i}.weight": 0.1 for i in range(3)},
            optimizer_step=step + 1,
        )
    return history


def reported_run(layers: int = 3, steps: int = 20, *, factor: float = 1.0, names=None) -> History:
    history = History()
    names = names or [f"conv{i}.weight" for i in range(layers)]
    for step in range(steps):
        row = {"train_loss": 1.0 / (step + 1), "normdyn/effective_lr": 0.1}
        for i, name in enumerate(names):
            row[f"weight_norm/{name}"] = factor * (i + 1) * (2 - step / steps)
            row[f"effective_lr/{name}"] = 0.1 / row[f"weight_norm/{name}"]
            row[f"angular_update/{name}"] = 0.01 * (i + 1)
            row[f"equilibrium_angular_update/{name}"] = 0.02
        history.append(10 * step, row, optimizer_step=step + 1)
    history.meta = {
        "targets": {names[0]: {"scale_invariant": "filter", "vectors": 8}},
        "settings": {"alpha": 0.0025},
    }
    return history


def expected_run(layers=3):
    """A run in which every layer turns 1.2 times too fast, but the last, which is not
    scale-invariant."""
    history = History()
    names = [f"conv{i}.weight" for i in range(layers)]
    for step in range(20):
        row = {}
        for name in names[:-1]:
            row[f"effective_lr/{name}"] = 0.1
            row[f"angular_update/{name}"] = 0.012
            row[f"expected_angular_update/{name}"] = 0.01
            row[f"expected_ratio/{name}"] = 1.2
            row[f"weight_norm/{name}"] = 1.0 + step
            row[f"expected_weight_norm/{name}"] = 2.0 + step
        row[f"matrix_angle/{names[-1]}"] = 0.02
        row[f"balanced_angular_update/{names[-1]}"] = 0.01
        row[f"balance_ratio/{names[-1]}"] = 2.0
        history.append(step, row, optimizer_step=step + 1)
    return history


def run_with_faults(layers: int = 160) -> History:
    """A healthy run, but for three layers: too long, too fast, and without a gradient."""
    history = History()
    factors = {layers // 4: 0.05, layers // 2: 3.2, 3 * layers // 4: 1e-6}
    for step in range(4):
        row = {}
        for i in range(layers):
            angle = 0.01 * factors.get(i, 1.0) * (1 + 0.001 * i)
            row[f"angular_update/block{i}.weight"] = angle
            row[f"expected_ratio/block{i}.weight"] = angle / 0.01
            row[f"weight_norm/block{i}.weight"] = 0.01 / angle
        history.append(step, row, optimizer_step=step + 1)
    return history


def run_with_three_faults(layers: int = 12, rows: int = 30) -> History:
    """A healthy run, but for three layers: one began 20 times too long, one has ten times the
    learning rate, and one gets no gradient."""
    history = History()
    names = [f"block{i}.weight" for i in range(layers)]
    long, fast, dead = names[3], names[6], names[9]
    for step in range(rows):
        lr = 0.1 if step < 0.6 * rows else 0.01
        row = {}
        for i, name in enumerate(names):
            norm = (20.0 if name == long else 1.0) * (1 + 0.01 * i)
            rate = 10 * lr if name == fast else lr
            settled = (2e-3 * rate) ** 0.5
            expected = settled / (20.0 if name == long else 1.0)
            row[f"weight_norm/{name}"] = norm
            row[f"effective_lr/{name}"] = rate / norm
            row[f"equilibrium_angular_update/{name}"] = settled
            row[f"expected_angular_update/{name}"] = expected
            row[f"angular_update/{name}"] = 1e-8 if name == dead else expected * (1 + 0.01 * i)
        history.append(10 * step, row, optimizer_step=10 * step + 1)
    history.mark(int(0.6 * rows) * 10, "lr_drop")
    history.meta["targets"] = {}
    for name in names:
        finding, words = "as expected", "as expected now (1.0x)"
        if name == dead:
            finding, words = "no gradient", "no gradient: only decay acts"
        history.meta["targets"][name] = {
            "scale_invariant": "filter",
            "vectors": 16,
            "finding": finding,
            "ratio": None if name == dead else 1.0,
            "verdict": words,
        }
    return history
