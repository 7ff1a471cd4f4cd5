"""Balances of single weights, row by row, through the table that holds those of many."""

from __future__ import annotations

from math import nan

import numpy as np

from lightning_normdyn.monitor.measured_balance import (
    SHOWN,
    Balance,
    BalanceRow,
    BalanceTable,
    MatrixSums,
    quantities_of,
)
from lightning_normdyn.monitor.pulls import End, Strength, passed_between


def sums_of(*numbers: float) -> MatrixSums:
    """Those of one weight; what is left out is 0."""
    whole = [*numbers, *[0.0] * (len(MatrixSums._fields) - len(numbers))]
    return MatrixSums(*np.array(whole, dtype=np.float64)[:, None])


def after(balance, number, sums, lr, strength, steps, *, is_set=False) -> Balance:
    """A balance with one more row of its weight; ``steps`` as for `passed_between`."""
    known = BalanceTable.from_values(("w",), [balance])
    rate = np.array([lr])
    row = BalanceRow(
        number,
        sums,
        rate,
        Strength(*(np.array([part]) for part in strength)),
        passed_between(known.ends, End(number, rate, sums.size), steps),
        is_known=np.array([bool(steps)]),
        is_set=np.array([is_set]),
        stepped=np.array([True]),
    )
    return known.after(row).of(0)


def shown_of(balance: Balance, entries: int, noise_coherence: float | None) -> dict[str, float]:
    """What is logged of it, by name."""
    table = BalanceTable.from_values(("w",), [balance])
    wanted = np.ones((len(SHOWN), 1), dtype=np.bool_)
    kappa = nan if noise_coherence is None else noise_coherence
    found = quantities_of(table, np.array([float(entries)]), np.array([kappa]), wanted)[:, 0]
    return {
        name: value for name, value in zip(SHOWN, found.tolist(), strict=True) if value == value
    }
