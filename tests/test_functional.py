"""The formulas against the papers' identities, closed forms and the edges of their domain."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch

from lightning_normdyn.functional import (
    angle_from_sums,
    angular_update,
    balanced_angular_update,
    coherence,
    coherence_error,
    cosine_from_sums,
    direction_lr,
    effective_lr,
    effective_step_size,
    equivalent_weight_decay,
    generalized_gaussian_shape,
    gradient_cosine,
    in_span_energy,
    input_space_basis,
    input_space_projection,
    loss_decay,
    norm_from_sums,
    project_tangent,
    radial_coefficient,
    rescale_factor,
    shrink_factor,
    spectral_rank,
    std_from_sums,
    weight_norm,
    weight_std,
)

LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def sums(a, b):
    return (a.double() * b.double()).flatten(1).sum(1)


# ---- Sizes ----


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION])
def test_sizes_equal_the_naive_ones_in_any_dtype(dtype):
    weight = randn(6, 3, 2, 2, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for ours, naive in ((weight_norm, reference.norm), (weight_std, reference.std)):
        result = ours(weight)
        assert result.dtype == expected
        torch.testing.assert_close(
            result, torch.stack([naive(w) for w in weight.double()]).to(expected)
        )


def test_sizes_keep_what_a_sum_in_the_storage_dtype_would_lose():
    weight = torch.full(
        (1, 70_000), 300.0, dtype=torch.float16
    )  # the sum of squares overflows float16
    assert weight_norm(weight).item() == pytest.approx(300 * math.sqrt(70_000))
    shifted = (1e4 + torch.tensor([[1.0, -1.0, 1.0, -1.0]])).float()
    assert weight_std(shifted).item() == 1.0


def test_sizes_from_sums():
    weight = randn(5, 40) + 3
    ww, w1 = sums(weight, weight), weight.sum(1)
    torch.testing.assert_close(norm_from_sums(ww), weight_norm(weight))
    torch.testing.assert_close(std_from_sums(ww, w1, 40), weight_std(weight), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        std_from_sums(ww, w1, torch.full((5,), 40)), weight_std(weight), rtol=1e-12, atol=0
    )
    constant = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert std_from_sums(sums(constant, constant), constant.sum(1), 3).item() == pytest.approx(
        0, abs=1e-8
    )  # never the root of -1e-18


def test_a_vector_without_a_second_dimension_is_refused():
    with pytest.raises(ValueError, match=r"two or more dimensions, \(n, d\), got shape \(3,\)"):
        weight_norm(torch.ones(3))
    with pytest.raises(
        ValueError,
        match=r"`before` and `after` must have the same shape, got \(3, 2\) and \(1, 2\)",
    ):
        angular_update(torch.ones(3, 2), torch.ones(1, 2))


# ---- Learning rates ----


def test_effective_learning_rates_and_the_identity_between_them():
    norm = torch.tensor([0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(effective_lr(0.1, norm), 0.1 / norm)
    torch.testing.assert_close(
        effective_lr(0.1, norm).square(), 0.1 * direction_lr(0.1, norm)
    )  # elr_S0 = sqrt(eta elr_dir)
    torch.testing.assert_close(
        direction_lr(torch.tensor(0.1, dtype=torch.float64), norm), 0.1 / norm**2
    )  # a tensor as learning rate


@pytest.mark.parametrize("function", [effective_lr, direction_lr])
def test_no_learning_rate_for_a_vector_without_direction(function):
    norm = torch.tensor([0.0, math.inf, math.nan, 1.0])
    assert function(0.1, norm).isnan().tolist() == [True, True, True, False]
    assert function(0.0, norm)[3] == 0


# ---- Angles ----


def turned(angle, growth, d=64, seed=0):
    """Vectors w and w' in float64 with the angle and the ratio of norms asked for, random
    directions."""
    w = randn(1, d, seed=seed)
    across = project_tangent(randn(1, d, seed=seed + 1), w)
    across = across / across.norm() * w.norm()
    return w, growth * (math.cos(angle) * w + math.sin(angle) * across)


ANGLES = [1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 0.1, 1.0, math.pi / 2, 3.0, math.pi - 1e-3, math.pi]
GROWTHS = [0.5, 0.999, 1.0, 1.001, 2.0, 20.0]


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("angle", ANGLES)
def test_the_angle_from_micro_radians_to_pi_while_the_norm_changes(angle, growth):
    before, after = turned(angle, growth)
    assert angular_update(before, after).item() == pytest.approx(angle, rel=1e-8)
    delta = after - before
    packed = angle_from_sums(sums(before, before), sums(before, delta), sums(delta, delta))
    assert packed.item() == pytest.approx(angle, rel=1e-3)


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_angle_of_stored_values_is_exact(dtype, angle, growth):
    before, after = (x.to(dtype) for x in turned(angle, growth, d=4608))
    result = angular_update(before, after)
    assert result.dtype == torch.float32
    # The angle between the rounded values themselves, in extended precision and by another formula.
    a, b = (x.double().numpy().astype(np.longdouble).ravel() for x in (before, after))
    a, b = a / np.sqrt((a * a).sum()), b / np.sqrt((b * b).sum())
    exact = float(2 * np.arctan2(np.sqrt(((a - b) ** 2).sum()), np.sqrt(((a + b) ** 2).sum())))
    assert result.item() == pytest.approx(exact, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("d", [1, 2, 7, 4608])
def test_a_step_along_the_weight_turns_nothing(d):
    """What rounding leaves of it would be another number on every number of ranks."""
    w = randn(200, d, seed=d)
    for factor in (1 - 1e-7, 0.999, 0.5, 1.7, 20.0):
        delta = factor * w - w
        assert angle_from_sums(sums(w, w), sums(w, delta), sums(delta, delta)).eq(0).all()


def test_no_angle_without_two_directions():
    one, zero, bad = torch.ones(1, 3), torch.zeros(1, 3), torch.tensor([[1.0, math.inf, 0.0]])
    assert angular_update(one, one).item() == pytest.approx(0, abs=1e-15)
    before, after = torch.cat([one, zero, zero, bad, one]), torch.cat([zero, one, zero, one, bad])
    assert angular_update(before, after).isnan().all()
    delta = after - before
    assert (
        angle_from_sums(sums(before, before), sums(before, delta), sums(delta, delta)).isnan().all()
    )


def test_the_effective_step_is_the_chord():
    before, after = randn(8, 30), randn(8, 30, seed=1)
    chord = (
        after / after.norm(dim=1, keepdim=True) - before / before.norm(dim=1, keepdim=True)
    ).norm(dim=1)
    torch.testing.assert_close(effective_step_size(angular_update(before, after)), chord)


# ---- Actions ----


def test_shrinking_is_exact_down_to_one_half():
    norm = torch.tensor([0.0, 1e-3, 1.0, 4.9999, 5.0, 7.0, 1e30], dtype=torch.float64)
    factor = shrink_factor(norm, 1.0, 0.1)
    torch.testing.assert_close(factor[:5], 1 - 0.1 * norm[:5], rtol=0, atol=0)
    assert factor[5:].tolist() == [0.5, 0.5]
    assert shrink_factor(torch.tensor([math.inf, math.nan]), 1.0, 0.1).tolist() == [1.0, 1.0]
    torch.testing.assert_close(factor[2], 1 - 1.0 * equivalent_weight_decay(0.1, norm)[2])


@pytest.mark.parametrize("statistic", ["norm", "std"])
def test_shrinking_is_eq_21(statistic):
    weight = randn(6, 3, 2, 2)
    size = (weight_norm if statistic == "norm" else weight_std)(weight)
    expected = reference.Shrink(0.05, statistic)(weight, lr=0.3)
    torch.testing.assert_close(
        shrink_factor(size, 0.3, 0.05).view(-1, 1, 1, 1) * weight, expected, rtol=0, atol=1e-14
    )


def test_per_vector_learning_rates():
    norm, lr = torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.2])
    torch.testing.assert_close(shrink_factor(norm, lr, 0.5), torch.tensor([0.95, 0.8]))
    torch.testing.assert_close(effective_lr(lr, norm), torch.tensor([0.1, 0.1]))


def test_rescaling_leaves_alone_what_has_no_factor():
    norm = torch.tensor([4.0, 0.0, math.inf, math.nan, 1e-45])
    assert rescale_factor(norm, 2.0)[:4].tolist() == [0.5, 1.0, 1.0, 1.0]
    assert rescale_factor(norm, 2.0).isfinite()[:4].all()
    assert rescale_factor(torch.tensor([2.0]), 0.0).tolist() == [1.0]
    assert rescale_factor(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 8.0])).tolist() == [0.5, 2.0]


def test_projection_is_idempotent_tangent_and_equal_to_the_naive_one():
    update, weight = randn(5, 3, 3), randn(5, 3, 3, seed=1)
    projected = project_tangent(update, weight)
    assert (sums(projected, weight)).abs().max() < 1e-14
    torch.testing.assert_close(project_tangent(projected, weight), projected, rtol=0, atol=1e-15)
    torch.testing.assert_close(
        projected, reference.tangent(update, weight, "filter"), rtol=0, atol=1e-14
    )
    along = radial_coefficient(sums(weight, weight), sums(weight, update)).view(-1, 1, 1)
    torch.testing.assert_close(update - along * weight, projected, rtol=0, atol=1e-15)


def test_projection_leaves_alone_what_has_no_tangent():
    update, weight = torch.ones(3, 2), torch.tensor([[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
    assert torch.equal(project_tangent(update, weight), update)
    assert (
        project_tangent(
            torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)
        ).dtype
        == torch.float32
    )


def test_cosine():
    weight, grad = randn(6, 20), randn(6, 20, seed=1)
    expected = torch.nn.functional.cosine_similarity(weight, grad)
    torch.testing.assert_close(gradient_cosine(weight, grad), expected)
    torch.testing.assert_close(
        cosine_from_sums(sums(weight, weight), sums(weight, grad), sums(grad, grad)), expected
    )
    assert gradient_cosine(weight, -3 * weight).tolist() == pytest.approx([-1.0] * 6)
    assert gradient_cosine(weight, -3 * weight).min() >= -1
    assert gradient_cosine(torch.zeros(1, 2), torch.ones(1, 2)).item() == 0
    assert gradient_cosine(torch.ones(1, 2), torch.zeros(1, 2)).item() == 0
    assert gradient_cosine(torch.ones(1, 2), torch.tensor([[math.nan, 1.0]])).isnan().item()
    assert gradient_cosine(torch.ones(1, 2), torch.tensor([[math.inf, 1.0]])).isnan().item()


# ---- Identities of the papers, on a loss that sees the direction of each filter only ----


def invariant_gradient(weight, seed=5):
    leaf = weight.clone().requires_grad_()
    inputs = randn(16, weight.shape[1], seed=seed)
    torch.tanh(inputs @ (leaf / leaf.norm(dim=1, keepdim=True)).T).square().sum().backward()
    return leaf.grad


def test_the_gradient_is_orthogonal_and_the_norm_grows_by_its_square():
    """WRS paper, Theorem 3.1 and Corollary 3.3; SGDP/AdamP, Lemma 2.1."""
    weight, lr = randn(4, 12), 0.3
    g = invariant_gradient(weight)
    assert gradient_cosine(weight, g).abs().max() < 1e-14
    growth = weight_norm(weight - lr * g).square() - weight_norm(weight).square()
    torch.testing.assert_close(growth, lr**2 * weight_norm(g).square(), rtol=1e-10, atol=1e-13)
    # and so plain SGD turns by exactly arctan(eta ‖g‖/‖w‖)
    angle = torch.atan(lr * weight_norm(g) / weight_norm(weight))
    torch.testing.assert_close(angular_update(weight, weight - lr * g), angle, rtol=1e-12, atol=0)


def test_momentum_makes_the_norm_grow_as_lemma_2_2_says():
    """N_{t+1} = N_t + eta² ‖p_t‖² + 2 eta² sum_k beta^(t-k) ‖p_k‖²."""
    weight, lr, beta, p, history = randn(3, 10), 0.1, 0.9, 0.0, []
    for t in range(12):
        p = beta * p + invariant_gradient(weight, seed=t)
        history.append(weight_norm(p).square())
        cross = sum(beta ** (t - k) * history[k] for k in range(t))
        after = weight - lr * p
        growth = weight_norm(after).square() - weight_norm(weight).square()
        torch.testing.assert_close(
            growth, lr**2 * history[t] + 2 * lr**2 * cross, rtol=1e-10, atol=1e-13
        )
        weight = after


# ---- Input space ----


def test_the_square_basis_is_a_rotation_and_the_truncated_one_is_not():
    weight, data = randn(7, 3, 4), randn(200, 12, seed=1) * torch.linspace(0.1, 2, 12)
    covariance = data.T @ data / 200
    rotated = input_space_projection(weight, covariance)
    torch.testing.assert_close(weight_norm(rotated), weight_norm(weight), rtol=1e-12, atol=0)
    eigenvalues, basis = input_space_basis(covariance)
    torch.testing.assert_close(basis @ torch.diag(eigenvalues) @ basis.T, covariance)
    assert (eigenvalues.diff() <= 0).all()
    truncated = input_space_projection(weight, covariance, rank=4)
    torch.testing.assert_close(truncated, rotated[:, :4])
    torch.testing.assert_close(
        in_span_energy(weight, basis[:, :4]),
        weight_norm(truncated).square() / weight_norm(weight).square(),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_noise_share_of_a_layer_with_a_known_span(dtype):
    """Inputs in a 5-dimensional subspace of 12; weights with a known share outside of it."""
    frame = torch.linalg.qr(randn(12, 12)).Q
    inputs = randn(300, 5, seed=1) @ frame[:, :5].T
    signal, noise = frame[:, :5] @ randn(5, 3, seed=2), frame[:, 5:] @ randn(7, 3, seed=3)
    weight = (signal + 0.3 * noise).T
    share = (signal**2).sum(0) / ((signal**2).sum(0) + (0.3 * noise).square().sum(0))
    eigenvalues, basis = input_space_basis((inputs.T @ inputs / 300).to(dtype))
    rank = spectral_rank(eigenvalues, 1.0 if dtype == torch.float64 else 1 - 1e-5)
    assert rank == 5
    torch.testing.assert_close(in_span_energy(weight, basis[:, :rank]), share, rtol=0, atol=1e-6)


def test_input_space_edges():
    assert spectral_rank(torch.zeros(3), 0.99) == 1
    assert spectral_rank(torch.tensor([1.0, 1.0, 1.0, 1.0]), 0.5) == 2
    assert spectral_rank(torch.tensor([1.0, -1e-18]), 1.0) == 1
    assert in_span_energy(torch.zeros(1, 2), torch.eye(2)).isnan().item()
    with pytest.raises(
        ValueError,
        match=r"`covariance` must be \(4, 4\) for vectors of 4 entries, got shape \(2, 2\)",
    ):
        input_space_projection(torch.ones(3, 4), torch.eye(2))
    with pytest.raises(ValueError, match="`rank` must be between 1 and 2, got 3"):
        input_space_projection(torch.ones(3, 2), torch.eye(2), rank=3)
    with pytest.raises(ValueError, match="square matrix"):
        input_space_basis(torch.ones(2, 3))
    with pytest.raises(ValueError, match="`basis` must have 2 rows"):
        in_span_energy(torch.ones(3, 2), torch.eye(3))
    with pytest.raises(ValueError, match=r"`energy` must be in \(0, 1\], got 0"):
        spectral_rank(torch.ones(2), 0)


# ---- Generalized Gaussian ----


def generalized_gaussian(shape, n, seed=0):
    """|x|^shape is Gamma(1/shape): exact samples for any shape."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(
        rng.gamma(1 / shape, size=n) ** (1 / shape) * rng.choice([-1, 1], size=n)
    )


@pytest.mark.parametrize("method", ["moments", "mle"])
@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 4.0])
def test_the_shape_is_found_within_three_percent(method, shape):
    """The mean of 5 draws of 20,000: at shape 4 the standard deviation of one draw is 3 % by
    itself."""
    estimates = [
        generalized_gaussian_shape(7.5 * generalized_gaussian(shape, 20_000, seed), method=method)
        for seed in range(5)
    ]
    assert np.mean(estimates) == pytest.approx(shape, rel=0.03)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("shape", [0.3, 0.5, 1.0, 2.0, 3.7, 10.0])
def test_the_moment_ratio_inverts_its_closed_form(shape):
    from scipy import stats

    quantiles = torch.from_numpy(stats.gennorm.ppf((np.arange(200_000) + 0.5) / 200_000, shape))
    ratio = (quantiles.abs().mean() ** 2 / quantiles.square().mean()).item()
    estimate = generalized_gaussian_shape(quantiles)
    back = math.exp(
        2 * math.lgamma(2 / estimate) - math.lgamma(1 / estimate) - math.lgamma(3 / estimate)
    )
    assert back == pytest.approx(ratio, abs=1e-12)
    assert estimate == pytest.approx(shape, rel=0.01)


def test_maximum_likelihood_equals_scipy():
    from scipy import stats

    x = generalized_gaussian(1.3, 500)
    expected, _, _ = stats.gennorm.fit(x.numpy(), floc=0)
    assert generalized_gaussian_shape(x, method="mle") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", ["moments", "mle"])
def test_the_shape_of_odd_data(method):
    uniform = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    assert generalized_gaussian_shape(uniform, method=method) > 20
    assert generalized_gaussian_shape(torch.ones(10), method=method) == pytest.approx(50)
    spike = torch.zeros(10_000).index_fill(0, torch.tensor([0]), 1.0)
    assert generalized_gaussian_shape(spike, method=method) < 0.15
    for nothing in (
        torch.zeros(10),
        torch.empty(0),
        torch.tensor([1.0, math.nan]),
        torch.tensor([1.0, math.inf]),
    ):
        assert math.isnan(generalized_gaussian_shape(nothing, method=method))
    scaled = randn(1000)
    assert generalized_gaussian_shape(1e-30 * scaled, method=method) == pytest.approx(
        generalized_gaussian_shape(scaled, method=method)
    )


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="`method` must be 'moments' or 'mle', got 'kurtosis'"):
        generalized_gaussian_shape(torch.ones(3), method="kurtosis")


def test_no_host_synchronisation_and_no_branch_on_values():
    """Everything that runs inside a step is traced whole, as fake tensors that hold no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        w, g, n = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4)
        lr = torch.tensor(0.1)
        for result in (
            *(
                weight_norm(w),
                weight_std(w),
                effective_lr(lr, n),
                direction_lr(lr, n),
                angular_update(w, g),
                effective_step_size(n),
            ),
            *(
                shrink_factor(n, lr, 0.1),
                rescale_factor(n, 1.0),
                project_tangent(g, w),
                gradient_cosine(w, g),
                norm_from_sums(n),
            ),
            *(
                angle_from_sums(n, n, n),
                radial_coefficient(n, n),
                cosine_from_sums(n, n, n),
                std_from_sums(n, n, 6),
            ),
        ):
            assert result.shape[0] == 4


# ---- The balance ----


def kinds(*values):
    """The same numbers as sequences, arrays and tensors."""
    yield [v if isinstance(v, float) else list(v) for v in values]
    yield [np.array(v) for v in values]
    yield [torch.tensor(v, dtype=torch.float64) for v in values]
    yield [torch.tensor(v, dtype=torch.float32) for v in values]


def test_coherence_is_the_growth_per_squared_angle_whatever_holds_the_numbers():
    pulls, squares = [1e-2, 3e-2, 0.0], [4e-4, 1e-4, 9e-4]
    expected = reference.coherence(2.0, 2.5, pulls, squares)
    for i, arguments in enumerate(kinds(2.0, 2.5, pulls, squares)):
        got = coherence(*arguments)
        assert isinstance(got, torch.Tensor) == (i > 1)
        assert got.dtype == (torch.float64 if i > 1 else np.float64)
        assert float(got) == pytest.approx(expected, rel=1e-12 if i < 3 else 1e-6)


def test_coherence_of_many_vectors_and_of_one_step():
    first, last = np.array([1.0, 2.0]), np.array([1.1, 1.9])
    pulls, squares = np.full((5, 2), 1e-3), np.full((5, 2), 1e-4)
    got = coherence(first, last, pulls, squares)
    expected = [
        reference.coherence(a, b, [1e-3] * 5, [1e-4] * 5) for a, b in zip(first, last, strict=True)
    ]
    assert got.tolist() == pytest.approx(expected)
    assert coherence(1.0, 1.0, 1e-3, 1e-3) == pytest.approx(2.001, abs=1e-4)
    # One number for all vectors, and each their own.
    assert coherence(first, last, [1e-3] * 5, [1e-4] * 5).tolist() == pytest.approx(expected)


def test_one_step_of_any_kind_has_the_coherence_of_the_exact_identity():
    """N'/N = (1 + r)² (1 + tan²θ): a step along the circle's tangent has a coherence of one."""
    before = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    after = torch.tensor([[1.0, 1e-4]], dtype=torch.float64)
    angle = angular_update(before, after)
    got = coherence(weight_norm(before), weight_norm(after), 0.0, angle**2)
    assert got.item() == pytest.approx(1)


def test_coherence_without_a_turn_is_not_a_number():
    assert math.isnan(coherence(1.0, 0.9, [0.1], [0.0]))
    assert math.isnan(coherence(1.0, 0.9, [0.1], [math.nan]))


def test_at_the_balanced_angle_the_norm_stays():
    for arguments in kinds([1e-4, 2e-4], [19.0, 1.0]):
        got = balanced_angular_update(*arguments)
        assert got.tolist() == pytest.approx([(2e-4 / 19) ** 0.5, 2e-2], rel=1e-6)
    angle = balanced_angular_update(1e-4, 19.0)
    assert coherence(1.0, 1.0, [1e-4] * 9, [angle**2] * 9) == pytest.approx(19, rel=1e-3)
    assert balanced_angular_update(0.0, 19.0) == 0
    assert np.isnan(balanced_angular_update(1e-4, [0.0, -3.0])).all()


def test_loss_decay_is_what_the_balance_leaves_over():
    for arguments in kinds([1e-4], [1e-3], [2e-5], [5e-3], [19.0]):
        got = loss_decay(*arguments)
        assert float(got[0]) == pytest.approx((19 * 25e-6 / 2 - 2e-5 - 1e-4) / 1e-3, rel=1e-5)
    # Settled, with the coherence of pure noise: the loss does nothing.
    angle = balanced_angular_update(1e-4, 19.0)
    assert loss_decay(1e-4, 1e-3, 0.0, angle, 19.0) == pytest.approx(0, abs=1e-15)


def test_coherence_error_falls_with_the_numbers_that_were_averaged():
    assert coherence_error(5e-3, -19.0, 200, 4096) == pytest.approx(
        2 / (5e-3 * math.sqrt(19 * 200 * 4096))
    )
    errors = coherence_error(torch.tensor([5e-3, 5e-3]), 19.0, torch.tensor([100, 400]), 4096)
    assert (errors[0] / errors[1]).item() == pytest.approx(2)
    assert coherence_error(0.0, 19.0, 200, 4096) == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.9, 0.95])
@pytest.mark.parametrize("kind", ["heavy ball", "AdamW"])
def test_the_coherence_of_a_random_walk_is_that_of_its_momentum(kind, momentum):
    """(1 + b)/(1 - b): also three times off the equilibrium norm."""
    pull = 1.5e-3
    if kind == "AdamW":
        hyper = {"lr": 4e-3, "betas": (momentum, 0.999), "weight_decay": pull / 4e-3}
        make, norm = torch.optim.AdamW, math.sqrt(4e-3 * 64 * 4e-3 / (2 * pull))
    else:
        # Momentum repeats a coupled decay.
        lr = 0.02
        hyper = {"lr": lr, "momentum": momentum, "weight_decay": pull * (1 - momentum) / lr}
        make, norm = torch.optim.SGD, (lr**2 * 63 / (2 * pull * (1 - momentum) ** 2)) ** 0.25
    assert walked_coherence(make, hyper, pull, 1.5 * norm, (160, 64)) == pytest.approx(
        (1 + momentum) / (1 - momentum), rel=0.02
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="newer torch only")
@pytest.mark.parametrize(("shape", "expected"), [((64, 64), 23.33), ((64, 256), 30.74)])
def test_the_coherence_of_muon_is_that_of_its_table(shape, expected):
    hyper = {"lr": 0.015, "weight_decay": 0.1}
    got = walked_coherence(torch.optim.Muon, hyper, 1.5e-3, 30.0, shape, whole=True, steps=4000)
    assert got == pytest.approx(expected, rel=0.02)


def walked_coherence(make, hyper, pull, norm, shape, *, whole=False, steps=5000):
    """Of gradients of pure noise, after the buffers have filled."""
    weight = randn(*shape)
    weight *= norm / (weight.norm() if whole else weight.norm(dim=1, keepdim=True))
    optimizer = make([weight], **hyper)
    generator = torch.Generator().manual_seed(1)
    squares, norms = [], []
    for _ in range(steps):
        rows = weight.reshape(1, -1) if whole else weight
        noise = torch.randn(*rows.shape, generator=generator, dtype=torch.float64)
        unit = rows / rows.norm(dim=1, keepdim=True)
        gradient = noise - (noise * unit).sum(1, keepdim=True) * unit
        weight.grad = (gradient / rows.norm(dim=1, keepdim=True)).reshape(shape)
        before = rows.clone()
        optimizer.step()
        after = weight.reshape(1, -1) if whole else weight
        squares.append(angular_update(before, after).square())
        norms.append(before.norm(dim=1))
    settled = slice(200, None)
    turned = torch.stack(squares[settled][:-1]).mean(1)
    grown = (norms[-1] / norms[settled][0]).log().mean().exp()
    return float(coherence(1.0, grown, [pull] * len(turned), turned))
