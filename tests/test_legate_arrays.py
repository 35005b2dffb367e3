"""cuPyNumeric arrays, and `backend`, in `least_squares`: the same call, the same result."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator

from lmsolve import curve_fit, least_squares
from tests.decay import X0, T, Y, curved, jacobian, nearly_dependent, residual, wide
from tests.nist import NAMES, digits, load

pytestmark = pytest.mark.legate


@pytest.fixture(scope="module")
def xp() -> Any:
    from lmsolve.legate._start import start

    return start()


@pytest.fixture(params=[None, "cupynumeric", "numpy", "auto"])
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


class Decay:
    """The fit on arrays of a library, whose functions check what they are given."""

    def __init__(self, xp: Any) -> None:
        self.xp, self.t, self.y = xp, xp.array(T), xp.array(Y)

    def fun(self, x: Any) -> Any:
        assert isinstance(x, self.xp.ndarray)
        return x[0] * self.xp.exp(-x[1] * self.t) + x[2] - self.y

    def jac(self, x: Any) -> Any:
        assert isinstance(x, self.xp.ndarray)
        e = self.xp.exp(-x[1] * self.t)
        return self.xp.stack([e, -x[0] * self.t * e, self.xp.ones_like(self.t)], axis=1)


def reference(**options: Any) -> Any:
    return least_squares(residual, X0, jacobian, args=(T, Y), **options)


def host(a: Any) -> np.ndarray:
    return np.asarray(a)


def test_arrays_in_arrays_out(xp: Any, backend: Any) -> None:
    decay = Decay(xp)
    result = least_squares(decay.fun, xp.array(X0), decay.jac, backend=backend)
    expected = reference()
    for name in ("x", "fun", "jac", "grad"):
        assert isinstance(result[name], xp.ndarray), name
        assert result[name].dtype == np.float64
    np.testing.assert_allclose(host(result.x), expected.x, rtol=1e-11)
    np.testing.assert_allclose(host(result.fun), expected.fun, atol=1e-12)
    np.testing.assert_allclose(host(result.jac), expected.jac, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.standard_errors(), expected.standard_errors(), rtol=1e-8)
    np.testing.assert_allclose(
        result.confidence_intervals(), expected.confidence_intervals(), rtol=1e-6
    )
    assert "x[2]" in str(result)


@pytest.mark.parametrize("jac", ["2-point", "3-point", "cs"])
def test_differences(xp: Any, backend: Any, jac: str) -> None:
    decay = Decay(xp)
    result = least_squares(decay.fun, xp.array(X0), jac, backend=backend)
    np.testing.assert_allclose(host(result.x), reference().x, rtol=1e-7)


def test_float32_stays_float32(xp: Any, backend: Any) -> None:
    t, y = xp.array(T.astype("f4")), xp.array(Y.astype("f4"))
    result = least_squares(
        lambda x: x[0] * xp.exp(-x[1] * t) + x[2] - y, xp.array(X0.astype("f4")), backend=backend
    )
    assert result.x.dtype == np.float32
    assert result.fun.dtype == np.float32
    np.testing.assert_allclose(host(result.x), reference().x, rtol=1e-3)


@pytest.mark.parametrize("loss", ["huber", "soft_l1", "cauchy"])
def test_losses(xp: Any, backend: Any, loss: str) -> None:
    decay = Decay(xp)
    result = least_squares(
        decay.fun, xp.array(X0), decay.jac, loss=loss, f_scale=0.01, backend=backend
    )
    expected = reference(loss=loss, f_scale=0.01)
    np.testing.assert_allclose(host(result.x), expected.x, rtol=1e-8)
    np.testing.assert_allclose(result.standard_errors(), expected.standard_errors(), rtol=1e-6)


def test_bounds_of_either_library(xp: Any, backend: Any) -> None:
    decay = Decay(xp)
    lb, ub = np.array([0.0, 0.0, 0.6]), np.array([2.0, 5.0, 2.0])
    expected = reference(bounds=(lb, ub))
    for bounds in ((lb, ub), (xp.array(lb), xp.array(ub))):
        result = least_squares(decay.fun, xp.array(X0), decay.jac, bounds=bounds, backend=backend)
        np.testing.assert_allclose(host(result.x), expected.x, rtol=1e-8)
        np.testing.assert_array_equal(result.active_mask, expected.active_mask)


def test_fewer_residuals_than_parameters(xp: Any, backend: Any) -> None:
    A = np.random.default_rng(0).standard_normal((3, 6))
    b = xp.array(A)
    result = least_squares(lambda x: b @ x - 1.0, xp.zeros(6), lambda x: b, backend=backend)
    assert result.cost < 1e-20
    expected = least_squares(lambda x: A @ x - 1.0, np.zeros(6), lambda x: A)
    np.testing.assert_allclose(host(result.x), expected.x, rtol=1e-8, atol=1e-10)


WIDE: dict[str, dict[str, Any]] = {
    "plain": {},
    "robust": {"loss": "soft_l1"},
    "own loss": {"loss": lambda z: np.stack([z, 1.0 + 0.0 * z, 0.0 * z])},
    "bounded": {"bounds": (-0.01, 0.01)},
    "bounded tightly, robust": {"bounds": (-1e-5, 1e-5), "loss": "huber"},
}


@pytest.mark.parametrize("options", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("torch_blocks", [False, True])
def test_wide_jacobians_stay_where_they_are(
    xp: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], torch_blocks: bool
) -> None:
    from lmsolve.legate import _sums
    from lmsolve.legate._blocks import TorchBlocks

    if torch_blocks:  # what a GPU computes with, here on CPUs
        monkeypatch.setattr(_sums, "_blocks", lambda: TorchBlocks("float64"))
    m, n = 12, 301
    expected = least_squares(wide(np, n)[0], np.zeros(n), wide(np, n)[1], **options)
    fun, jac = wide(xp, n)
    transfers = Transfers(xp, monkeypatch)
    result = least_squares(fun, xp.zeros(n), jac, backend="cupynumeric", **options)
    assert max(transfers.sizes) <= 8 * n  # x0; J would be m times that
    residuals = [size for size in transfers.sizes if size == 8 * m]
    # The weights of a loss that cuPyNumeric computes are read beside them.
    assert len(residuals) == result.njev * (2 if callable(options.get("loss")) else 1)
    if "bounds" not in options:
        # A launch for the step, and at an accepted point one for the gradient and one for K.
        launches = [size for size in transfers.sizes if size == 64]
        assert len(launches) <= (result.nfev + 1) + 2 * result.njev
    monkeypatch.undo()
    assert (result.nfev, result.njev) == (expected.nfev, expected.njev)
    assert result.cost == pytest.approx(expected.cost, rel=1e-9, abs=1e-20)
    np.testing.assert_allclose(host(result.x), expected.x, rtol=1e-6, atol=1e-9)
    assert result.rank == expected.rank
    assert isinstance(result.jac, xp.ndarray)


@pytest.mark.parametrize("options", [{}, {"loss": "soft_l1"}, {"jac": True}], ids=str)
def test_a_trial_of_a_wide_problem_reads_its_cost_alone(
    xp: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    from legate.core import TaskTarget

    from lmsolve.legate import _tasks

    told = 32 * _tasks.processors(TaskTarget.CPU)  # a row of four numbers from each
    m, n = 12, 40
    x0 = 2.0 * np.random.default_rng(1).standard_normal(n)
    expected = least_squares(
        curved(np, n)[0], x0, curved(np, n)[1], **{k: v for k, v in options.items() if k != "jac"}
    )
    fun, jac = curved(xp, n)
    transfers = Transfers(xp, monkeypatch)
    marks: list[int] = []

    def marked(x: Any) -> Any:
        assert isinstance(x, xp.ndarray)
        marks.append(len(transfers.sizes))
        return (fun(x), jac(x)) if options.get("jac") else fun(x)

    result = least_squares(marked, xp.array(x0), **{"jac": jac, **options}, backend="cupynumeric")
    assert len(marks) == result.nfev == expected.nfev
    assert not all(trial.accepted for trial in result.history)
    marks.append(len(transfers.sizes))
    np.testing.assert_allclose(host(result.x), expected.x, rtol=1e-7)
    for k, trial in enumerate(result.history, start=1):
        cost, *linearized = transfers.sizes[marks[k] : marks[k + 1]]
        assert cost == told
        if not trial.accepted:
            assert linearized == []
        else:  # x and r; launches for the gradient, for J J', and for a step of the polish
            assert linearized[:2] == [8 * n, 8 * m]
            assert set(linearized[2:]) == {told}
            assert len(linearized) <= 5


@pytest.mark.parametrize("scheme", ["2-point", "3-point", "cs"])
def test_differences_of_a_wide_problem_stay_where_they_are(
    xp: Any, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    n = 40
    expected = least_squares(wide(np, n)[0], np.zeros(n), scheme)
    transfers = Transfers(xp, monkeypatch)
    result = least_squares(wide(xp, n)[0], xp.zeros(n), scheme, backend="cupynumeric")
    assert max(transfers.sizes) <= 8 * n
    # A trial reads its cost, an accepted one at most five times more: see the test above.
    fixed = 6 * result.njev + (result.nfev - result.njev) + 3
    halves = 0 if scheme == "cs" else 4 * n * result.njev  # of central differences, retaken once
    assert len(transfers.sizes) <= fixed + halves
    np.testing.assert_allclose(host(result.x), expected.x, atol=1e-6 if scheme == "cs" else 1e-4)
    assert result.cost < 1e-20
    assert isinstance(result.jac, xp.ndarray)


def complex_wide(xp: Any) -> tuple[Any, Any]:
    """fun and jac of 7 complex equations for 20 complex parameters."""
    rng = np.random.default_rng(3)
    A = xp.array(rng.standard_normal((7, 20)) + 1j * rng.standard_normal((7, 20)))
    b = xp.array(rng.standard_normal(7) + 0j)
    return (
        lambda z: A @ z + 0.1 * xp.sin(A @ z) - b,
        lambda z: A * (1.0 + 0.1 * xp.cos(A @ z))[:, None],
    )


@pytest.mark.parametrize("real", [False, True])
def test_complex_wide_problems_stay_where_they_are(
    xp: Any, monkeypatch: pytest.MonkeyPatch, real: bool
) -> None:
    x0 = np.zeros(20, dtype=float if real else complex)
    expected = least_squares(complex_wide(np)[0], x0, complex_wide(np)[1])
    fun, jac = complex_wide(xp)
    transfers = Transfers(xp, monkeypatch)
    result = least_squares(fun, xp.array(x0), jac, backend="cupynumeric")
    assert max(transfers.sizes) == x0.nbytes  # J has 14 numbers for each of x
    # A trial reads its cost, an accepted one x, r and three launches.
    assert len(transfers.sizes) <= 6 * result.njev + (result.nfev - result.njev) + 3
    assert result.nfev == expected.nfev
    np.testing.assert_allclose(host(result.x), expected.x, atol=1e-9)
    assert result.jac.shape == (7, 20)


def own_loss(xp: Any) -> Any:
    """log(1 + z) by a library."""
    return lambda z: xp.stack([xp.log1p(z), 1.0 / (1.0 + z), -1.0 / (1.0 + z) ** 2])


def as_operator(J: np.ndarray) -> LinearOperator:
    """J as products with it."""
    return LinearOperator(
        J.shape, matvec=lambda p: J @ p.ravel(), rmatvec=lambda z: J.T @ z.ravel()
    )


@pytest.mark.parametrize("kind", ["operator", "sparse"])
@pytest.mark.parametrize("m_less_than_n", [False, True])
def test_what_scipy_works_on_takes_residuals_to_the_host_at_accepted_points_only(
    xp: Any, monkeypatch: pytest.MonkeyPatch, kind: str, m_less_than_n: bool
) -> None:
    m, n = (12, 301) if m_less_than_n else (1_000, 3)
    (fun, _), (whole, rows) = (
        (wide(library, n) if m_less_than_n else long_decay(library, m)) for library in (xp, np)
    )
    x0 = np.zeros(n) if m_less_than_n else X0
    options = {"x_scale": 1.0} if kind == "operator" else {}
    form = as_operator if kind == "operator" else csr_array
    expected = least_squares(whole, x0, lambda x: form(rows(x)), **options)
    transfers = Transfers(xp, monkeypatch)
    result = least_squares(
        fun, xp.array(x0), lambda x: form(rows(np.asarray(x))), backend="cupynumeric", **options
    )
    assert transfers.sizes.count(64) == result.nfev == expected.nfev  # the costs
    assert transfers.sizes.count(8 * m) == result.njev  # the residuals
    assert max(transfers.sizes) == 8 * max(m, n)
    np.testing.assert_allclose(host(result.x), expected.x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [{}, {"loss": "soft_l1", "f_scale": 0.1}, {"bounds": (-1.0, 2.0)}, {"loss": own_loss}],
    ids=["plain", "robust", "bounded", "own loss"],
)
@pytest.mark.parametrize("torch_blocks", [False, True])
@pytest.mark.parametrize("m_less_than_n", [False, True])
def test_iterations_take_their_products_where_the_rows_are(
    xp: Any,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    torch_blocks: bool,
    m_less_than_n: bool,
) -> None:
    from lmsolve.legate import _sums
    from lmsolve.legate._blocks import TorchBlocks

    if torch_blocks:  # what a GPU computes with, here on CPUs
        monkeypatch.setattr(_sums, "_blocks", lambda: TorchBlocks("float64"))
    m, n = (12, 40) if m_less_than_n else (1_000, 3)
    own = callable(options.get("loss"))
    ours, theirs = (
        {"tr_solver": "lsmr", **options, **({"loss": own_loss(library)} if own else {})}
        for library in (xp, np)
    )
    (fun, jac), (whole, rows) = (
        (wide(library, n) if m_less_than_n else long_decay(library, m)) for library in (xp, np)
    )
    x0 = np.zeros(n) if m_less_than_n else X0
    expected = least_squares(whole, x0, rows, **theirs)
    with monkeypatch.context() as patched:
        transfers = Transfers(xp, patched)
        result = least_squares(fun, xp.array(x0), jac, backend="cupynumeric", **ours)
    assert max(transfers.sizes) <= max(64, 8 * n)  # r has m numbers, or they are few
    np.testing.assert_allclose(host(result.x), expected.x, rtol=1e-6, atol=1e-8)
    assert result.cost == pytest.approx(expected.cost, rel=1e-9, abs=1e-18)


def undetermined(xp: Any, m: int = 8, n: int = 20) -> tuple[Any, Any]:
    """fun and jac of a fit that determines two of its n parameters and mixes up the others."""
    rng = np.random.default_rng(2)
    a = np.zeros((m, n))
    a[:5, :2] = rng.standard_normal((5, 2))
    a[5:, 2:-1] = rng.standard_normal((m - 5, n - 3))
    A, b = xp.array(a), xp.array(rng.standard_normal(m))
    return (
        lambda x: A @ x + 0.1 * xp.sin(A @ x) - b,
        lambda x: A * (1.0 + 0.1 * xp.cos(A @ x))[:, None],
    )


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "soft_l1", "f_scale": 0.2},
        {"fixed": np.arange(20) % 3 == 2},
        {"loss": own_loss},
    ],
    ids=["plain", "robust", "fixed", "own loss"],
)
def test_standard_errors_of_a_wide_problem_take_no_column_to_the_host(
    xp: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], few: bool
) -> None:
    m, n = (8, 20) if few else (12, 301)
    if not few and "fixed" in options:
        options = {"fixed": np.arange(n) > 6}  # more residuals than parameters that are free
    own = callable(options.get("loss"))
    problem = undetermined if few else wide
    ours, theirs = (
        {**options, "loss": own_loss(library)} if own else options for library in (xp, np)
    )
    expected = least_squares(problem(np, n=n)[0], np.zeros(n), problem(np, n=n)[1], **theirs)
    fun, jac = problem(xp, n=n)
    result = least_squares(fun, xp.zeros(n), jac, backend="cupynumeric", **ours)
    transfers = Transfers(xp, monkeypatch)
    absolute = result.standard_errors(absolute_sigma=True)
    found = result.standard_errors(), result.rank
    monkeypatch.undo()
    assert max(transfers.sizes) <= 8 * m  # J has m n numbers
    assert found[1] == expected.rank
    np.testing.assert_allclose(found[0], expected.standard_errors(), rtol=1e-6)
    np.testing.assert_allclose(absolute, expected.standard_errors(absolute_sigma=True), rtol=1e-6)
    assert np.isfinite(absolute).any() == (few or "fixed" in options)
    np.testing.assert_allclose(result.covariance(), expected.covariance(), rtol=1e-5, atol=1e-12)


def test_wide_jacobians_of_dependent_rows_go_over_to_qr(xp: Any) -> None:
    A = np.random.default_rng(0).standard_normal((5, 40))
    A[3] = A[4] + 1e-9 * A[3]
    b = A @ np.linspace(-1.0, 1.0, 40)
    expected = least_squares(lambda x: A @ x - b, np.zeros(40), lambda x: A)
    for module in (np, xp):  # NumPy's columns are read by the tasks
        a, c = module.array(A), module.array(b)
        result = least_squares(
            lambda x, a=a, c=c: a @ x - c,
            module.zeros(40),
            lambda x, a=a: a,
            backend="cupynumeric",
        )
        assert result.state.escalated
        np.testing.assert_allclose(host(result.x), expected.x, atol=1e-6)


def test_wide_jacobians_in_single_precision(xp: Any) -> None:
    A = np.random.default_rng(0).standard_normal((5, 40))
    a, b = xp.array(A.astype("f4")), xp.array((A @ np.linspace(-1.0, 1.0, 40)).astype("f4"))
    result = least_squares(
        lambda x: a @ x - b,
        xp.zeros(40, dtype="f4"),
        lambda x: a,
        backend="cupynumeric",
        max_nfev=5,
    )
    assert result.x.dtype == np.float32
    d = 1.0 / np.linalg.norm(A, axis=0)  # of the least scaled norm
    expected = d * (np.linalg.pinv(A * d) @ host(b))
    np.testing.assert_allclose(host(result.x), expected, atol=1e-5)


def test_streamed_blocks(xp: Any, backend: Any) -> None:
    decay = Decay(xp)
    parts = [slice(i, i + 100) for i in range(0, len(T), 100)]
    result = least_squares(
        lambda x: (decay.fun(x)[part] for part in parts),
        xp.array(X0),
        lambda x: ((decay.fun(x)[part], decay.jac(x)[part]) for part in parts),
        backend=backend,
    )
    np.testing.assert_allclose(host(result.x), reference().x, rtol=1e-11)


def test_arguments_callback_and_checkpoint(xp: Any, backend: Any) -> None:
    t, y = xp.array(T), xp.array(Y)
    seen = []

    def fun(x: Any, t: Any, y: Any, *, sign: float) -> Any:
        return sign * (x[0] * xp.exp(-x[1] * t) + x[2] - y)

    options: Any = {"args": (t, y), "kwargs": {"sign": -1.0}, "backend": backend}
    first = least_squares(fun, xp.array(X0), max_nfev=3, callback=seen.append, **options)
    assert seen
    assert all(isinstance(x, xp.ndarray) for x in seen)
    result = least_squares(fun, xp.array(X0), resume=first.state, **options)
    np.testing.assert_allclose(host(result.x), reference().x, rtol=1e-7)


def test_pair_of_residuals_and_jacobian(xp: Any, backend: Any) -> None:
    decay = Decay(xp)
    result = least_squares(
        lambda x: (decay.fun(x), decay.jac(x)), xp.array(X0), jac=True, backend=backend
    )
    np.testing.assert_allclose(host(result.x), reference().x, rtol=1e-11)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("Nelson", "MGH10")])
def test_certified_values_with_the_sums_taken_by_legate(name: str) -> None:
    nist = load(name)
    result = least_squares(nist.fun, nist.starts[1], nist.jac, backend="cupynumeric")
    expected = digits(least_squares(nist.fun, nist.starts[1], nist.jac).x, nist.certified)
    assert digits(result.x, nist.certified) >= min(expected, 9) - 0.5


def test_numpy_functions_with_the_sums_taken_by_legate() -> None:
    result = least_squares(residual, X0, jacobian, args=(T, Y), backend="cupynumeric")
    assert type(result.x) is np.ndarray
    np.testing.assert_allclose(result.x, reference().x, rtol=1e-12)
    differenced = least_squares(residual, X0, args=(T, Y), backend="cupynumeric")
    np.testing.assert_allclose(differenced.x, reference().x, rtol=1e-7)


def test_ill_conditioned_jacobian_goes_over_to_qr(xp: Any) -> None:
    A, b = nearly_dependent()
    for a, c, x0 in ((A, b, np.ones(4)), (xp.array(A), xp.array(b), xp.ones(4))):
        result = least_squares(
            lambda x, a=a, c=c: a @ x - c, x0, lambda x, a=a: a, backend="cupynumeric"
        )
        np.testing.assert_allclose(host(result.x), [1.0, 2.0, 3.0, 4.0], rtol=1e-6)


def test_a_large_product_goes_to_legate_and_a_small_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lmsolve.legate import _tasks

    launches = [0]
    launch = _tasks.launch

    def counted(*arguments: Any, **keywords: Any) -> Any:
        launches[0] += 1
        return launch(*arguments, **keywords)

    monkeypatch.setattr(_tasks, "launch", counted)
    A = np.random.default_rng(0).standard_normal((60_000, 100))
    b = A @ np.arange(100.0)
    result = least_squares(
        lambda x: A @ x - b, np.ones(100), lambda x: A, backend="auto", max_nfev=2
    )
    assert launches[0] == result.njev
    launches[0] = 0
    reference(backend="auto")
    assert launches[0] == 0


@pytest.mark.parametrize(("m", "goes"), [(50, False), (250, True)])
def test_a_wide_product_of_numpy_goes_to_legate_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, m: int, goes: bool
) -> None:
    from lmsolve.legate import _sums

    made = []

    class Counted(_sums.WideEquations):
        def __init__(self, *arguments: Any) -> None:
            made.append(1)
            super().__init__(*arguments)

    monkeypatch.setattr(_sums, "WideEquations", Counted)
    A = np.random.default_rng(0).standard_normal((m, 20_000))
    result = least_squares(
        lambda x: A @ x - 1.0, np.zeros(20_000), lambda x: A, backend="auto", max_nfev=2
    )
    assert len(made) == (result.njev if goes else 0)
    np.testing.assert_allclose(A @ result.x, 1.0, atol=1e-9)


@pytest.mark.parametrize("tr_solver", [None, "lsmr"])
@pytest.mark.parametrize("kind", ["tall", "wide"])
def test_a_jacobian_is_free_before_the_next_one_is_reduced(
    xp: Any, monkeypatch: pytest.MonkeyPatch, kind: str, tr_solver: str | None
) -> None:
    """Without the garbage collector, which does not know that Legate's arrays are large."""
    from lmsolve.legate._sums import ShardedSums

    alive, before = weakref.WeakSet[Any](), []

    def noted(make: Any) -> Any:
        def made(*arguments: Any) -> Any:
            before.append(len(alive))
            alive.add(sub := make(*arguments))
            return sub

        return made

    for name in ("subproblem", "iterated"):
        monkeypatch.setattr(ShardedSums, name, noted(getattr(ShardedSums, name)))
    fun, jac = curved(xp, 40) if kind == "wide" else (Decay(xp).fun, Decay(xp).jac)
    x0 = xp.array(X0 if kind == "tall" else 2.0 * np.random.default_rng(1).standard_normal(40))
    gc.disable()
    try:
        result = least_squares(fun, x0, jac, backend="cupynumeric", tr_solver=tr_solver)
    finally:
        gc.enable()
    assert result.njev == len(before) > 3
    assert set(before) == {0}


class Transfers:
    """Counts what reaches the host: arrays of cuPyNumeric, and stores that tasks wrote."""

    def __init__(self, xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from lmsolve.legate import _tasks

        self.sizes: list[int] = []
        array, read = xp.ndarray.__array__, _tasks.read

        def counted_array(a: Any, *arguments: Any, **keywords: Any) -> Any:
            self.sizes.append(a.nbytes)
            return array(a, *arguments, **keywords)

        def counted_read(store: Any) -> Any:
            found = read(store)
            self.sizes.append(found.nbytes)
            return found

        monkeypatch.setattr(xp.ndarray, "__array__", counted_array)
        monkeypatch.setattr(_tasks, "read", counted_read)


def test_transfers_are_counted(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = xp.arange(5.0)
    transfers = Transfers(xp, monkeypatch)
    np.asarray(a)
    float(xp.sum(a))
    bool(xp.all(a < 1))
    assert transfers.sizes == [40, 8, 1]


def long_decay(xp: Any, m: int, blocks: int = 0) -> tuple[Any, Any]:
    """fun and jac of a decay of m rows, in blocks where asked for."""
    decay = Decay(xp)
    decay.t = xp.array(np.linspace(0.0, 3.0, m))
    decay.y = 2.5 * xp.exp(-1.3 * decay.t) + 0.5 + 0.05 * xp.sin(200.0 * decay.t)
    if not blocks:
        return decay.fun, decay.jac
    cuts = [slice(i * m // blocks, (i + 1) * m // blocks) for i in range(blocks)]
    return (
        lambda x: (decay.fun(x)[cut] for cut in cuts),
        lambda x: ((decay.fun(x)[cut], decay.jac(x)[cut]) for cut in cuts),
    )


@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        (0, {}),
        (0, {"loss": "soft_l1", "f_scale": 0.1}),
        (0, {"loss": lambda z: (z, 1.0 + 0.0 * z, 0.0 * z)}),
        (0, {"bounds": ([0.0, 0.0, 0.0], [2.0, 9.0, 9.0])}),
        (0, {"jac": "2-point"}),
        (3, {}),
        (3, {"loss": "huber", "f_scale": 0.1}),
    ],
    ids=["plain", "robust", "own loss", "bounded", "differences", "streamed", "streamed robust"],
)
def test_one_transfer_per_trial_of_a_size_that_m_does_not_change(
    xp: Any, monkeypatch: pytest.MonkeyPatch, blocks: int, options: dict[str, Any]
) -> None:
    if "loss" in options and callable(options["loss"]):
        own = options["loss"]
        options = {"loss": lambda z: xp.stack(own(z))}
    totals = []
    for m in (3_000, 30_000):
        fun, jac = long_decay(xp, m, blocks)
        with monkeypatch.context() as patched:
            transfers = Transfers(xp, patched)
            result = least_squares(
                fun, xp.array(X0), **{"jac": jac, **options}, backend="cupynumeric", max_nfev=6
            )
        evaluations = result.nfev + result.njev
        # Beside those: x0, whether the residuals and the Jacobian are finite there.
        assert len(transfers.sizes) <= evaluations + 3
        assert max(transfers.sizes) < 200
        totals.append((result.nfev, result.njev, sum(transfers.sizes)))
        assert result.fun is None or isinstance(result.fun, xp.ndarray)
    assert totals[0] == totals[1]


def complex_decay(xp: Any, m: int) -> tuple[Any, Any]:
    """fun and jac of a decaying oscillation of m complex rows, and two complex parameters."""
    t = xp.array(np.linspace(0.0, 2.0, m))
    y = (2 - 1j) * xp.exp(-(0.5 + 3j) * t) + 0.01 * xp.exp(200j * t)

    def jac(z: Any) -> Any:
        e = xp.exp(-z[1] * t)
        return xp.stack([e, -z[0] * t * e], axis=1)

    return lambda z: z[0] * xp.exp(-z[1] * t) - y, jac


Z0 = np.array([1.5 - 0.5j, 0.4 + 2.7j])


@pytest.mark.parametrize(
    "options",
    [{}, {"loss": "soft_l1", "f_scale": 0.005}, {"jac": "2-point"}, {"jac": "3-point"}],
    ids=str,
)
def test_complex_arrays_stay_where_they_are(
    xp: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    totals = []
    for m in (3_000, 30_000):
        fun, jac = complex_decay(xp, m)
        given = {"jac": jac, **options}
        with monkeypatch.context() as patched:
            transfers = Transfers(xp, patched)
            result = least_squares(fun, xp.array(Z0), **given, backend="cupynumeric")
        # Two sums for each column tell whether the halves of a central difference are unequal.
        central = result.njev * 2 * 4 if given["jac"] == "3-point" else 0
        assert len(transfers.sizes) <= result.nfev + result.njev + central + 3
        assert max(transfers.sizes) < 700
        totals.append((result.nfev, result.njev, sum(transfers.sizes)))
        for name in ("x", "fun", "jac", "grad"):
            assert isinstance(result[name], xp.ndarray), name
            assert result[name].dtype == np.complex128
        fun, jac = complex_decay(np, m)
        expected = least_squares(fun, Z0, **{"jac": jac, **options})
        np.testing.assert_allclose(host(result.x), expected.x, rtol=1e-7)
        np.testing.assert_allclose(result.standard_errors(), expected.standard_errors(), rtol=1e-6)
    assert totals[0] == totals[1]


def test_complex_residuals_of_real_parameters(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def functions(xp: Any, m: int) -> tuple[Any, Any]:
        fun, jac = complex_decay(xp, m)
        return (
            lambda x: fun([x[0] - 1j, 0.5 + 1j * x[1]]),
            lambda x: jac([x[0] - 1j, 0.5 + 1j * x[1]]) * xp.array([1.0, 1j]),
        )

    x0 = np.array([1.5, 2.7])
    transfers = Transfers(xp, monkeypatch)
    result = least_squares(*[functions(xp, 3_000)[0], xp.array(x0), functions(xp, 3_000)[1]])
    expected = least_squares(functions(np, 3_000)[0], x0, functions(np, 3_000)[1])
    np.testing.assert_allclose(host(result.x), expected.x, rtol=1e-9)
    assert max(transfers.sizes) >= 3_000  # too small to gain
    transfers.sizes.clear()
    fun, jac = functions(xp, 3_000)
    result = least_squares(fun, xp.array(x0), jac, backend="cupynumeric")
    assert max(transfers.sizes) < 200
    np.testing.assert_allclose(host(result.x), expected.x, rtol=1e-9)
    with pytest.raises(TypeError, match="`jac` must be real"):
        least_squares(lambda x: xp.real(fun(x)), xp.array(x0), jac, backend="cupynumeric")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "soft_l1", "f_scale": 0.1},
        {"loss": lambda z: (np.log1p(z), 1.0 / (1.0 + z), -1.0 / (1.0 + z) ** 2)},
        {"bounds": ([0.0, 0.0, 0.0], [2.0, 9.0, 9.0])},
    ],
    ids=["plain", "robust", "own loss", "bounded"],
)
def test_covariance_takes_nothing_of_the_length_of_m_to_the_host(
    xp: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    stacked = dict(options)
    if callable(options.get("loss")):
        own, options = options["loss"], {"loss": lambda z: np.stack(own(z))}
        stacked = {"loss": lambda z: xp.stack(own(z))}
    fun, jac = long_decay(xp, 3_000)
    whole, rows = long_decay(np, 3_000)
    result = least_squares(fun, xp.array(X0), jac, backend="cupynumeric", **stacked)
    expected = least_squares(whole, X0, rows, **options)
    transfers = Transfers(xp, monkeypatch)
    covariance, errors = result.covariance(), result.standard_errors()
    assert len(transfers.sizes) == (2 if "loss" in options else 1)
    assert max(transfers.sizes) <= 8 * 2 * 16  # a triangle (n + 1, n + 1) for each of 2 shards
    np.testing.assert_allclose(covariance, expected.covariance(), rtol=1e-8)
    np.testing.assert_allclose(errors, expected.standard_errors(), rtol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_certified_standard_errors_of_arrays(xp: Any, name: str) -> None:
    nist = load(name)
    result = least_squares(
        lambda x: xp.array(nist.fun(np.asarray(x))),
        xp.array(nist.starts[1]),
        lambda x: xp.array(nist.jac(np.asarray(x))),
        backend="cupynumeric",
    )
    expected = least_squares(nist.fun, nist.starts[1], nist.jac)
    # Of residuals of unit variance: those of Lanczos1 are rounding errors of the data.
    np.testing.assert_allclose(
        result.standard_errors(absolute_sigma=True),
        expected.standard_errors(absolute_sigma=True),
        rtol=1e-6,
    )


@pytest.mark.parametrize("loss", ["linear", "cauchy"])
def test_streams_of_many_blocks_are_summed_exactly(xp: Any, loss: str) -> None:
    fun, jac = long_decay(xp, 4_001, blocks=7)
    whole, rows = long_decay(np, 4_001)
    result = least_squares(fun, xp.array(X0), jac, loss=loss, f_scale=0.1, backend="cupynumeric")
    expected = least_squares(whole, X0, rows, loss=loss, f_scale=0.1)
    np.testing.assert_allclose(host(result.x), expected.x, rtol=1e-10)
    assert result.cost == pytest.approx(expected.cost, rel=1e-12)


def test_exceptions_of_blocks_are_raised(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmsolve.legate._sums import ArrayFunctions

    def failing(*arguments: Any) -> Any:
        raise ZeroDivisionError("in a task")

    monkeypatch.setattr(ArrayFunctions, "cost", failing)
    fun, jac = long_decay(xp, 1_000, blocks=2)
    with pytest.raises(ZeroDivisionError, match="in a task"):
        least_squares(fun, xp.array(X0), jac, backend="cupynumeric")


def test_residuals_stay_where_they_are_and_reject_a_step_that_is_not_finite(xp: Any) -> None:
    fun, jac = long_decay(xp, 3_000)
    seen = []

    def broken(x: Any) -> Any:
        r = fun(x)
        if len(seen) < 2 and float(x[1]) > 1.25:
            seen.append(float(x[1]))
            r[1234] = np.nan
        return r

    result = least_squares(broken, xp.array(X0), jac, backend="cupynumeric")
    assert seen
    assert sum(not trial.accepted for trial in result.history) >= len(seen)
    np.testing.assert_allclose(
        host(result.x), least_squares(*long_decay(np, 3_000)[:1], X0).x, rtol=1e-6
    )


def test_differences_that_would_not_fit_are_refused(
    xp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEGATE_CONFIG", "--cpus 2 --sysmem 1")
    fun, _ = long_decay(xp, 30_000)
    with pytest.raises(MemoryError, match=r"differences of `fun` need 1.92 MB .* --sysmem 3"):
        least_squares(fun, xp.array(X0), backend="cupynumeric")


def test_torch_blocks_serve_arrays_too(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes with, here on CPUs."""
    from lmsolve.legate import _sums
    from lmsolve.legate._blocks import TorchBlocks

    monkeypatch.setattr(_sums, "_blocks", lambda: TorchBlocks("float64"))
    for blocks in (0, 3):
        fun, jac = long_decay(xp, 3_000, blocks)
        for options in ({}, {"loss": "huber", "f_scale": 0.05}):
            result = least_squares(fun, xp.array(X0), jac, backend="cupynumeric", **options)
            whole, rows = long_decay(np, 3_000)
            expected = least_squares(whole, X0, rows, **options)
            np.testing.assert_allclose(host(result.x), expected.x, rtol=1e-8)


def test_curve_fit_on_cupynumeric_data(xp: Any) -> None:
    def model(t: Any, a: Any, b: Any, c: Any) -> Any:
        return a * xp.exp(-b * t) + c

    popt, pcov = curve_fit(model, xp.array(T), xp.array(Y), X0)
    expected, covariance = curve_fit(lambda t, a, b, c: a * np.exp(-b * t) + c, T, Y, X0)
    np.testing.assert_allclose(host(popt), expected, rtol=1e-7)
    np.testing.assert_allclose(host(pcov), covariance, rtol=1e-4)


def test_the_page_on_legate_runs() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "legate.md"
    sources = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for source in sources:
        exec(compile(source, str(page), "exec"), names)
    assert names["result"].success
    assert names["fit"].success


def test_unknown_backend_is_told() -> None:
    with pytest.raises(ValueError, match=r"`backend` must be one of None, 'auto'"):
        reference(backend="cuda")
