"""`check_jac` finds what is wrong with a Jacobian and says where."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.sparse.linalg import aslinearoperator

from lmsolve import check_jac
from tests.nist import NAMES, load
from tests.tools import Decay

DECAY = Decay()
X = np.array([2.0, 1.0, 0.3])


@pytest.mark.parametrize("name", NAMES)
def test_right_jacobians_agree(name):
    p = load(name)
    found = check_jac(p.fun, p.certified, p.jac)
    assert found and found.ok and found.error < 1e-5
    assert "agrees" in str(found)


@pytest.mark.parametrize("convert", [np.asarray, np.ndarray.tolist, csr_array, aslinearoperator])
def test_kinds_of_jacobians(convert):
    assert check_jac(DECAY.fun, X, lambda x: convert(DECAY.jac(x)))


@pytest.mark.parametrize(
    ("change", "size"),
    [(lambda v: -v, 2.0), (lambda v: 1.01 * v, 0.01), (lambda v: np.nan, np.inf)],
)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (7, 1), (39, 2)])
def test_the_worst_entry_is_named(row, column, change, size):
    def jac(x):
        J = DECAY.jac(x)
        J[row, column] = change(J[row, column])
        return J

    found = check_jac(DECAY.fun, X, jac)
    exact = DECAY.jac(X)
    assert not found and (found.row, found.column) == (row, column)
    assert found.expected == pytest.approx(exact[row, column], rel=1e-6)
    assert f"row {row}, column {column}" in found.message and "wrong" in found.message
    largest = np.abs(exact[:, column]).max()
    expected = size * abs(exact[row, column]) / max(largest, abs(found.got))
    assert found.error == pytest.approx(expected, rel=1e-3)


def test_a_tolerance():
    def jac(x):
        return 1.001 * DECAY.jac(x)

    assert not check_jac(DECAY.fun, X, jac)
    assert check_jac(DECAY.fun, X, jac, rtol=2e-3)


def test_arguments_are_passed_on():
    def fun(x, t, *, offset):
        return x[0] * t + offset

    def jac(x, t, *, offset):
        return t[:, None]

    assert check_jac(fun, [2.0], jac, args=(np.arange(5.0),), kwargs={"offset": 1.0})


@pytest.mark.parametrize(
    ("jac", "error", "text"),
    [
        ("2-point", TypeError, "`jac` must be callable"),
        (lambda x: np.ones((40, 4)), ValueError, "got (40, 4)"),
        (lambda x: DECAY.jac(x).T, ValueError, "got (3, 40)"),
    ],
)
def test_wrong_calls(jac, error, text):
    with pytest.raises(error) as caught:
        check_jac(DECAY.fun, X, jac)
    assert text in str(caught.value)
