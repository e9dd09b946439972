"""Norms from the factors against dense float64 matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aroma.criteria import difference, inner_value, outer_value, pair_norms, relative_norms, weight_norms

LARGEST_EXPONENT = {torch.float64: 12, torch.float32: 12, torch.bfloat16: 12, torch.float16: 3}
"""Powers of ten that a dtype holds with room for a normal deviate."""

DTYPES = list(LARGEST_EXPONENT)
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 15))


def norm(*matrices: Tensor) -> float:
    """Product of Frobenius norms: the size that rounding errors are relative to."""
    size = 1.0
    for matrix in matrices:
        size *= float(matrix.double().norm())
    return size


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(0, 15),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32),
    st.data(),
)
def test_norms_equal_those_of_dense_matrices(m: int, n: int, r: int, dtype: Any, seed: int, data: Any) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        exponent = data.draw(st.integers(-LARGEST_EXPONENT[dtype], LARGEST_EXPONENT[dtype]), label="exponent")
        return (10.0**exponent * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    b, b0, a, a0 = draw(m, r), draw(m, r), draw(r, n), draw(r, n)
    weight = draw(n, m).T if data.draw(st.booleans(), label="transposed") else draw(m, n)
    product, earlier = b.double() @ a.double(), b0.double() @ a0.double()
    found = pair_norms([(b, a), (b0, a0), difference((b, a), (b0, a0))])
    (whole,) = weight_norms([lambda: weight], [(b, a)])
    bounds = norm(b, a), norm(b0, a0), norm(b, a) + norm(b0, a0)
    for value, dense, size in zip(found, (product, earlier, product - earlier), bounds, strict=True):
        assert value == pytest.approx(float(dense.norm()), rel=0, abs=1e-7 * size)
    expected = float((weight.double() + product).norm())
    assert whole == pytest.approx(expected, rel=0, abs=1e-12 * (norm(weight) + norm(b, a)))


def test_each_pair_keeps_its_place_whatever_its_shape() -> None:
    pairs = [
        (torch.full((m, r), float(k)), torch.ones(r, 4)) for k, (m, r) in enumerate([(3, 1), (5, 2), (3, 1), (3, 2)])
    ]
    assert pair_norms(pairs) == pytest.approx([float((b @ a).norm()) for b, a in pairs])
    assert pair_norms([]) == []


def test_an_update_that_undoes_the_weight_leaves_nothing() -> None:
    B, A = torch.randn(30, 2, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64)
    assert weight_norms([lambda: -(B @ A)], [(B, A)])[0] <= 1e-14 * norm(B, A)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scales_neither_overflow_nor_vanish(scale: float, dtype: torch.dtype) -> None:
    b, a, weight = ((scale * torch.randn(shape)).to(dtype) for shape in ((9, 2), (2, 7), (9, 7)))
    dense = b.double() @ a.double()
    assert pair_norms([(b, a), difference((2 * b, a), (b, a))]) == pytest.approx([float(dense.norm())] * 2)
    assert weight_norms([lambda: weight], [(b, a)])[0] == pytest.approx(float((weight.double() + dense).norm()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nothing_not_finite_passes_as_a_number(bad: float) -> None:
    b, a, weight = torch.ones(3, 1), torch.ones(1, 4), torch.ones(3, 4)
    worse = torch.full_like(b, bad)
    values = pair_norms([(worse, a), difference((worse, a), (b, a)), difference((b, a), (worse, a))])
    values += weight_norms([lambda: weight], [(worse, a)])
    assert not torch.tensor(values).isfinite().any()


def test_ratios_are_undefined_where_there_was_nothing() -> None:
    assert (inner_value(-0.5, 2.0), inner_value(1.0, 0.0)) == (-0.25, None)
    assert (outer_value(1.0, 2.0), outer_value(1.0, 0.0), outer_value(0.0, 0.0)) == (0.5, None, 0.0)
    update = torch.ones(3, 1), torch.ones(1, 4)
    assert relative_norms([lambda: torch.ones(3, 4), lambda: torch.zeros(3, 4)], [update] * 2) == [1.0, None]


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation reads or makes; views are free."""

    elements = 0

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
@pytest.mark.parametrize("size", [(64, 48), (700, 512)])
def test_no_copy_of_the_weight_is_made_and_no_pair_multiplied_out(size: tuple[int, int], transposed: bool) -> None:
    m, n = size
    weight = torch.randn(n, m).bfloat16().T if transposed else torch.randn(m, n).bfloat16()
    B, A = torch.randn(m, 3), torch.randn(3, n)
    assert elements_touched(lambda: weight_norms([lambda: weight], [(B, A)])) <= m * n / 7
    assert elements_touched(lambda: pair_norms([difference((B, A), (B, A))])) <= 2 * 3 * m


def test_measurements_gather_what_lies_on_several_devices() -> None:
    # Tensors without data know their device. The number itself is asked for last, once everything is on one.
    def measure() -> None:
        pairs = [(torch.empty(6, 1, device=on), torch.empty(1, 5, device=on)) for on in ("cuda:0", "cuda:1")]
        pair_norms([*pairs, difference(pairs[0], (torch.empty(6, 1), torch.empty(1, 5)))])

    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        measure()
