"""Closed forms against dense float64 matrices, and against exact fractions where even float64 cancels."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aroma.criteria import (
    cross_term,
    difference_norm_squared,
    inner_product,
    merged_norm_squared,
    product_norm_squared,
)

LARGEST_EXPONENT = {torch.float64: 12, torch.float32: 12, torch.bfloat16: 12, torch.float16: 3}
"""Powers of ten that a dtype holds with room for a normal deviate."""

SIZES = st.fixed_dictionaries({"m": st.integers(1, 40), "n": st.integers(1, 12), "rank": st.integers(0, 15)})
DTYPES = st.sampled_from(list(LARGEST_EXPONENT))
SEEDS = st.integers(0, 2**32)


def random_matrix(
    data: st.DataObject, generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    exponent = data.draw(st.integers(-LARGEST_EXPONENT[dtype], LARGEST_EXPONENT[dtype]), label="exponent")
    return (10.0**exponent * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def norm(*matrices: Tensor) -> float:
    """Product of Frobenius norms: the size that rounding errors are relative to."""
    size = 1.0
    for matrix in matrices:
        size *= float(matrix.double().norm())
    return size


@settings(deadline=None, max_examples=150)
@given(SIZES, DTYPES, SEEDS, st.data())
def test_product_norm_equals_dense(size: dict, dtype: torch.dtype, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    b = random_matrix(data, generator, (size["m"], size["rank"]), dtype)
    a = random_matrix(data, generator, (size["rank"], size["n"]), dtype)
    value = product_norm_squared(b, a)
    dense = (b.double() @ a.double()).square().sum()
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert value >= 0
    assert_close(value, dense, rtol=0, atol=1e-12 * norm(b, a) ** 2)


@settings(deadline=None, max_examples=150)
@given(SIZES, DTYPES, SEEDS, st.data())
def test_difference_norm_equals_dense(size: dict, dtype: torch.dtype, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, b0 = (random_matrix(data, generator, (size["m"], size["rank"]), dtype) for _ in range(2))
    a, a0 = (random_matrix(data, generator, (size["rank"], size["n"]), dtype) for _ in range(2))
    value = difference_norm_squared(b, a, b0, a0)
    dense = (b.double() @ a.double() - b0.double() @ a0.double()).square().sum()
    assert value >= 0
    # The pieces (b − b0) a and b0 (a − a0) bound the rounding, not the products alone.
    spread = norm(b, a) + norm(b0, a) + norm(b0, a0)
    assert_close(value, dense, rtol=0, atol=1e-12 * spread**2)


@settings(deadline=None, max_examples=100)
@given(SIZES, DTYPES, SEEDS, st.booleans(), st.data())
def test_merged_norm_equals_dense(
    size: dict, dtype: torch.dtype, seed: int, transposed: bool, data: st.DataObject
) -> None:
    m, n = size["m"], size["n"]
    generator = torch.Generator().manual_seed(seed)
    weight = random_matrix(data, generator, (n, m) if transposed else (m, n), dtype)
    weight = weight.T if transposed else weight
    B = random_matrix(data, generator, (m, size["rank"]), torch.float32)
    A = random_matrix(data, generator, (size["rank"], n), torch.float32)
    value = merged_norm_squared(weight, B, A)
    dense = (weight.double() + B.double() @ A.double()).square().sum()
    assert value.shape == ()
    assert value >= 0
    assert_close(value, dense, rtol=0, atol=1e-12 * (norm(weight) + norm(B, A)) ** 2)


@settings(deadline=None, max_examples=100)
@given(SIZES, DTYPES, SEEDS, st.data())
def test_inner_products_equal_dense(size: dict, dtype: torch.dtype, seed: int, data: st.DataObject) -> None:
    m, n = size["m"], size["n"]
    generator = torch.Generator().manual_seed(seed)
    weight = random_matrix(data, generator, (m, n), dtype)
    B = random_matrix(data, generator, (m, size["rank"]), torch.float32)
    A = random_matrix(data, generator, (size["rank"], n), torch.float32)
    b = random_matrix(data, generator, (m, 2), dtype)
    a = random_matrix(data, generator, (2, n), dtype)
    component = b.double() @ a.double()
    with_weight = (weight.double() * component).sum()
    assert_close(cross_term(weight, b, a), with_weight, rtol=0, atol=1e-12 * norm(weight, b, a))
    with_finished = (B.double() @ A.double() * component).sum()
    assert_close(inner_product(B, A, b, a), with_finished, rtol=0, atol=1e-12 * norm(B, A, b, a))


def test_merged_norm_where_the_update_undoes_the_weight() -> None:
    B, A = torch.randn(30, 2, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64)
    value = merged_norm_squared(-(B @ A), B, A)
    assert 0 <= value <= (1e-14 * norm(B, A)) ** 2


# Accuracy ------------------------------------------------------------------------------------------------------------


def exact_product(b: Tensor, a: Tensor) -> list[Fraction]:
    """Entries of b a, of the given floating-point numbers without any rounding."""
    rows = [[Fraction(x) for x in row] for row in b.tolist()]
    columns = [[Fraction(x) for x in column] for column in a.T.tolist()]
    return [sum((x * y for x, y in zip(row, column, strict=True)), Fraction(0)) for row in rows for column in columns]


def exact_difference(b: Tensor, a: Tensor, b0: Tensor, a0: Tensor) -> float:
    """‖b a − b0 a0‖², rounded once."""
    entries = zip(exact_product(b, a), exact_product(b0, a0), strict=True)
    return float(sum((now - before) ** 2 for now, before in entries))


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 3), st.integers(1, 13), st.sampled_from(["both", "b", "a"]), SEEDS)
def test_difference_of_almost_equal_products_is_exact_to_nine_digits(
    rank: int, digits: int, moved: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    b0 = torch.randn(6, rank, generator=generator, dtype=torch.float64)
    a0 = torch.randn(rank, 5, generator=generator, dtype=torch.float64)
    b = b0 + (moved != "a") * 10.0**-digits * torch.randn(6, rank, generator=generator, dtype=torch.float64)
    a = a0 + (moved != "b") * 10.0**-digits * torch.randn(rank, 5, generator=generator, dtype=torch.float64)
    exact = exact_difference(b, a, b0, a0)
    assert float(difference_norm_squared(b, a, b0, a0)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("factor", [3.0, 1e-3, 1e5])
def test_difference_sees_that_a_rescaled_pair_is_the_same_product(rank: int, factor: float) -> None:
    b, a = torch.randn(50, rank, dtype=torch.float64), torch.randn(rank, 40, dtype=torch.float64)
    change = float(difference_norm_squared(b * factor, a / factor, b, a)) ** 0.5
    # Summing Gram products would leave about 1e-8 of the pieces (b − b0) a, b0 (a − a0) here.
    assert change <= 1e-13 * norm(b, a) * max(factor, 1 / factor)


@pytest.mark.parametrize("b_scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("a_scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scales_neither_overflow_nor_vanish(b_scale: float, a_scale: float, dtype: torch.dtype) -> None:
    b, a = (b_scale * torch.randn(9, 2)).to(dtype), (a_scale * torch.randn(2, 7)).to(dtype)
    weight = (b_scale * torch.randn(9, 7)).to(dtype)
    dense = b.double() @ a.double()
    for value, oracle in [
        (product_norm_squared(b, a), dense.square().sum()),
        (difference_norm_squared(2 * b, a, b, a), dense.square().sum()),
        (merged_norm_squared(weight, b, a), (weight.double() + dense).square().sum()),
        (cross_term(weight, b, a), (weight.double() * dense).sum()),
    ]:
        assert 0 < abs(oracle) < torch.inf
        assert_close(value, oracle, rtol=1e-10, atol=0)


def test_nothing_not_finite_passes_as_a_number() -> None:
    b, a, weight = torch.ones(3, 1), torch.ones(1, 4), torch.ones(3, 4)
    for bad in (torch.nan, torch.inf):
        bad_b = torch.full_like(b, bad)
        values = [
            product_norm_squared(bad_b, a),
            difference_norm_squared(bad_b, a, b, a),
            difference_norm_squared(b, a, bad_b, a),
            merged_norm_squared(weight, bad_b, a),
            cross_term(weight, bad_b, a),
        ]
        assert not torch.stack(values).isfinite().any()


# Batches, graphs, memory ---------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation reads or makes; views are free.

    Inputs count too: inside its kernel, an operation on a large tensor may copy it where no one sees.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


def elements_touched(compute: Callable[[], object]) -> int:
    with LargestTensor() as largest:
        compute()
    return largest.elements


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", list(LARGEST_EXPONENT), ids=str)
@pytest.mark.parametrize("size", [(64, 48), (700, 512)])
def test_no_copy_of_the_weight_is_made(size: tuple[int, int], dtype: torch.dtype, transposed: bool) -> None:
    m, n = size
    weight = torch.randn(n, m).to(dtype).T if transposed else torch.randn(m, n).to(dtype)
    B, A = torch.randn(m, 3), torch.randn(3, n)
    assert elements_touched(lambda: weight.double() + B.double() @ A.double()) == m * n
    assert elements_touched(lambda: merged_norm_squared(weight, B, A)) <= m * n / 7
    assert elements_touched(lambda: cross_term(weight, B, A)) <= m * n / 7


@pytest.mark.parametrize("rank", [1, 3])
def test_pairs_are_never_multiplied_out(rank: int) -> None:
    m, n = 300, 200
    b, a = torch.randn(m, rank), torch.randn(rank, n)
    pair = m * max(rank, 1)
    assert elements_touched(lambda: product_norm_squared(b, a)) <= pair
    assert elements_touched(lambda: difference_norm_squared(b, a, b, a)) <= pair
    assert elements_touched(lambda: inner_product(b, a, b, a)) <= pair
