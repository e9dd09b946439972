"""Singular values and overlaps from factors against dense ones; effective rank against cases done by hand."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from aroma.errors import NonFiniteError
from aroma.spectra import effective_rank, singular_values
from aroma_lab.run.result import spectra_of

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


@pytest.mark.parametrize("sigma", [[], [0.0], [0.0, 0.0, 0.0]])
def test_effective_rank_of_nothing_is_0(sigma: list) -> None:
    assert effective_rank(torch.tensor(sigma)) == 0.0


def test_effective_rank_by_hand() -> None:
    # p = (3/4, 1/4): exp of the entropy is (4/3)^(3/4) · 4^(1/4).
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx((4 / 3) ** 0.75 * 4**0.25, rel=1e-12)


# The record of a run -------------------------------------------------------------------------------------------------


def test_a_record_says_the_ranks_of_every_module() -> None:
    B, A = draw_factors(6, 5, 3, 0, (0, 0), torch.float32)
    components = {
        "grown": (B, A),
        "masked": (torch.cat([B[:, :2], torch.zeros(6, 1)], dim=1), A),
        "empty": (torch.zeros(4, 0), torch.zeros(0, 7)),
        "wide": draw_factors(2, 5, 3, 1, (0, 0), torch.float32),
    }
    record = json.loads(json.dumps(spectra_of(components), allow_nan=False))
    for name, (left, right) in components.items():
        dense = torch.linalg.svdvals(left.double() @ right.double())
        assert record["effective_ranks"][name] == pytest.approx(effective_rank(dense))
    assert record["effective_rank"] == pytest.approx(sum(record["effective_ranks"].values()) / 4)


def test_a_method_without_components_has_no_average() -> None:
    assert spectra_of({}) == {"effective_rank": None, "effective_ranks": {}}


def test_a_diverged_update_is_named() -> None:
    B, A = torch.ones(3, 1), torch.tensor([[1.0, math.nan]])
    with pytest.raises(NonFiniteError, match=r"layer\.0\.A='not finite': .*training has diverged"):
        spectra_of({"layer.0": (B, A)})
