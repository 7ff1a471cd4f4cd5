"""The GPU programs, in Triton's interpreter; the tests themselves are in `on_triton`."""

from __future__ import annotations

import pytest
from triton_process import needs_triton, run_tests

pytestmark = needs_triton
FILE = "tests/geometry/on_triton.py"


def test_one_layout_per_kind_of_tile():
    run_tests(FILE, "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "angles"])
def test_all_layouts(dtype):
    chosen = dtype if dtype == "angles" else f"torch.{dtype}"
    run_tests(FILE, "-m", "slow", "-k", chosen)


@pytest.mark.slow
def test_callbacks_follow_their_papers():
    """Every callback under two optimizers, as `test_conformance` has them."""
    one_mode = "test_follows_its_paper and (-adamw] or -sgd]) and not default and not scaler"
    bf16 = "test_trains_bf16_weights"
    run_tests("tests/test_conformance.py", "-k", f"({one_mode}) or {bf16}")
