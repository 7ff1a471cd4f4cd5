"""The GPU programs, in Triton's interpreter; the tests themselves are in `on_triton`."""

from __future__ import annotations

import pytest
from triton_process import needs_triton, run_tests

pytestmark = needs_triton
FILE = "tests/geometry/on_triton.py"


def test_one_layout_per_kind_of_tile():
    run_tests(FILE, "-m", "not slow")


# Few processes: the start of one costs a fifth of the tests of a dtype.
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "tests", ["angles or torch.float32", "torch.bfloat16 or torch.float16", "torch.float64"]
)
def test_all_layouts(tests):
    run_tests(FILE, "-m", "slow", "-k", tests)


@pytest.mark.slow
def test_callbacks_follow_their_papers():
    """Every callback under two optimizers, as `test_conformance` has them."""
    one_mode = "test_follows_its_paper and (-adamw] or -sgd]) and not default and not scaler"
    bf16 = "test_trains_bf16_weights"
    run_tests("tests/test_conformance.py", "-k", f"({one_mode}) or {bf16}")


@pytest.mark.slow
def test_weights_in_pieces_on_two_ranks():
    """Some of them cut, others whole on one rank; vectors of one slot and of several."""
    run_tests("tests/geometry/test_dtensor.py", "-k", "over_tensor_parallelism and 2-1")
