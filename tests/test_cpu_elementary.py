"""The CPU engine's elementary functions against float64: this processor's, and those without AVX-512."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="the CPU engine needs numba (extra: cpu)")

from numba import njit, types
from numba.extending import register_jitable

from fastm2rec.cpu import avx512, elementary
from fastm2rec.cpu.simd import LANES, load, store

Function = Callable[[np.ndarray], np.ndarray]
ULP = 2.0**-23

needs_avx512 = pytest.mark.skipif(not avx512.AVAILABLE, reason="this processor has no AVX-512")


def _compiled(function: Any) -> Function:
    """`function` of Lanes as one of arrays."""

    @njit(error_model="numpy")
    def apply(x, y):
        for i in range(0, x.size, LANES):
            store(y, i, function(load(x, i)))

    def padded(x: np.ndarray) -> np.ndarray:
        whole = np.zeros(-(-x.size // LANES) * LANES, x.dtype)
        whole[: x.size] = x
        out = np.empty_like(whole)
        apply(whole, out)
        return out[: x.size]

    return padded


def _portable(coefficients: Any) -> Any:
    return register_jitable(elementary._power(types.float32, coefficients[types.float32]))


EXP2 = pytest.mark.parametrize("exp2", [elementary.exp2, _portable(elementary._EXP2)], ids=["own", "portable"])
DECAY = pytest.mark.parametrize("decay", [elementary.decay, _portable(elementary._DECAY)], ids=["own", "portable"])


def _error(function: Function, exact: Function, x: np.ndarray) -> float:
    """The largest one, relative."""
    expected = exact(x.astype(np.float64))
    return float(np.abs(function(x) / expected - 1).max())


def _exact_sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _between(low: float, high: float, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).uniform(low, high, 200_000).astype(dtype)


@EXP2
@pytest.mark.parametrize("span", [1e-3, 1.0, 99.0])
def test_exp2(exp2: Any, span: float) -> None:
    assert _error(_compiled(exp2), np.exp2, _between(-span, span)) <= 2 * ULP


@DECAY
def test_decay(decay: Any) -> None:
    """Its error is half as large, and nothing at 1."""
    compiled = _compiled(decay)
    assert _error(compiled, np.exp2, _between(-99, 0)) <= ULP
    assert _error(compiled, np.exp2, _between(-1e-3, 0)) <= ULP / 2
    assert compiled(np.zeros(1, np.float32))[0] == 1


@pytest.mark.parametrize("function", [elementary.exp2, elementary.decay, _portable(elementary._EXP2)])
def test_exponentials_of_what_is_no_number_or_too_small(function: Any) -> None:
    """NaN stays NaN, and a tail is 0 or next to it."""
    got = _compiled(function)(np.array([np.nan, -np.inf, -1e4, -150], np.float32))
    assert np.isnan(got[0])
    assert (got[1:] >= 0).all()
    assert (got[1:] < 1e-30).all()


@needs_avx512
@pytest.mark.parametrize("function", [elementary.exp2, elementary.decay])
def test_an_exponential_too_large_is_infinite(function: Any) -> None:
    assert np.isinf(_compiled(function)(np.array([129, 1e6, np.inf], np.float32))).all()


def test_sigmoid() -> None:
    sigmoid = _compiled(elementary.sigmoid)
    assert _error(sigmoid, _exact_sigmoid, _between(-1, 1)) <= 2 * ULP
    assert _error(sigmoid, _exact_sigmoid, _between(0, 80)) <= 2 * ULP
    assert _error(sigmoid, _exact_sigmoid, _between(-80, 0)) <= 40 * ULP  # of x log2(e), a rounding of its own
    assert np.array_equal(sigmoid(np.array([200, np.inf], np.float32)), [1, 1])
    assert (sigmoid(np.array([-200, -np.inf], np.float32)) < 1e-37).all()
    assert np.isnan(sigmoid(np.full(1, np.nan, np.float32)))


def test_reciprocal() -> None:
    reciprocal = _compiled(elementary.reciprocal)
    x = np.exp2(_between(-120, 120))
    assert _error(reciprocal, lambda x: 1 / x, np.concatenate([x, -x])) <= ULP
    assert np.isnan(reciprocal(np.full(1, np.nan, np.float32)))


@pytest.mark.parametrize(
    ("function", "exact"),
    [(elementary.exp2, np.exp2), (elementary.decay, np.exp2), (elementary.sigmoid, _exact_sigmoid)],
)
def test_in_float64(function: Any, exact: Function) -> None:
    x = _between(-5, 5, np.float64)
    assert float(np.abs(_compiled(function)(x) / exact(x.astype(np.longdouble)) - 1).max()) <= 1e-15
