"""Private attributes are read or refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_normdyn import NotSupportedError
from lightning_normdyn.geometry.internals import TESTED, private


def test_private_attributes_in_order():
    assert private(SimpleNamespace(_a=1, _b=2), "_b", "_a") == [2, 1]


def test_a_missing_one_is_named_with_both_versions():
    with pytest.raises(NotSupportedError, match="SimpleNamespace has no `_b`") as error:
        private(SimpleNamespace(_a=1), "_a", "_b")
    assert TESTED in str(error.value)
    assert torch.__version__ in str(error.value)
