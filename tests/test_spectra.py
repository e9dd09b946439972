"""Singular values through the small core against dense ones; effective rank against cases done by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from aroma.spectra import effective_rank, singular_values

FACTORS = st.fixed_dictionaries(
    {
        "m": st.integers(1, 9),
        "n": st.integers(1, 9),
        "R": st.integers(0, 14),  # often beyond min(m, n)
        "seed": st.integers(0, 2**32),
        "exponents": st.tuples(st.integers(-12, 12), st.integers(-12, 12)),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    }
)


def draw_factors(m: int, n: int, R: int, seed: int, exponents: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B = 10.0 ** exponents[0] * torch.randn(m, R, generator=generator, dtype=torch.float64)
    A = 10.0 ** exponents[1] * torch.randn(R, n, generator=generator, dtype=torch.float64)
    return B.to(dtype), A.to(dtype)


@settings(deadline=None, max_examples=150)
@given(FACTORS)
def test_equal_to_the_dense_singular_values(case: dict) -> None:
    B, A = draw_factors(**case)
    sigma = singular_values(B, A)
    dense = torch.linalg.svdvals(B.double() @ A.double())
    assert sigma.dtype == torch.float64
    assert sigma.shape == (min(case["R"], case["m"], case["n"]),)
    assert (sigma.diff() <= 0).all()
    largest = float(dense[0])
    assert_close(sigma, dense[: len(sigma)], rtol=0, atol=1e-12 * largest)
    assert (dense[len(sigma) :] <= 1e-12 * largest).all(), "what is left out must be zero"


def test_half_precision_factors() -> None:
    B, A = draw_factors(6, 5, 3, 0, (0, 0), torch.float16)
    assert_close(singular_values(B, A), torch.linalg.svdvals(B.double() @ A.double())[:3])


def test_no_component_has_no_singular_value() -> None:
    assert singular_values(torch.zeros(4, 0), torch.zeros(0, 7)).tolist() == []


def test_orthogonal_components_by_hand() -> None:
    B = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    A = torch.tensor([[0.0, 0.0, 2.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    assert singular_values(B, A).tolist() == pytest.approx([6.0, 5.0])


def test_trainable_factors_give_values_without_a_graph() -> None:
    B, A = torch.nn.Parameter(torch.randn(4, 2)), torch.nn.Parameter(torch.randn(2, 3))
    assert not singular_values(B, A).requires_grad


@pytest.mark.parametrize("sigma", [[], [0.0], [0.0, 0.0, 0.0]])
def test_effective_rank_of_nothing_is_0(sigma: list) -> None:
    assert effective_rank(torch.tensor(sigma)) == 0.0


@pytest.mark.parametrize("count", [1, 2, 8, 31])
def test_effective_rank_of_equal_values_is_their_number(count: int) -> None:
    assert effective_rank(torch.full((count,), 0.3)) == pytest.approx(count, rel=1e-6)


def test_effective_rank_by_hand() -> None:
    # p = (3/4, 1/4): exp of the entropy is (4/3)^(3/4) · 4^(1/4).
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx((4 / 3) ** 0.75 * 4**0.25, rel=1e-12)


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20),
    st.integers(-280, 280),
    st.integers(0, 5),
)
def test_effective_rank_ignores_scale_and_zeros_and_is_bounded(values: list, exponent: int, zeros: int) -> None:
    sigma = torch.tensor(values, dtype=torch.float64)
    padded = torch.cat([sigma * 10.0**exponent, torch.zeros(zeros, dtype=torch.float64)])
    assert effective_rank(padded) == pytest.approx(effective_rank(sigma), rel=1e-9)
    assert 1 - 1e-9 <= effective_rank(sigma) <= len(values) * (1 + 1e-9)


def test_effective_rank_of_huge_values_stays_finite() -> None:
    assert effective_rank(torch.full((4,), 1e308, dtype=torch.float64)) == pytest.approx(4)


def test_effective_rank_of_nan_is_nan() -> None:
    assert math.isnan(effective_rank(torch.tensor([1.0, math.nan])))
