"""A problem evaluated in row shards inside Legate's tasks is the problem NumPy solves."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmsolve import least_squares
from lmsolve.legate import rows
from lmsolve.legate._memory import require
from tests.decay import X0, T, Y, jacobian, nearly_dependent, residual
from tests.nist import digits, load

pytestmark = pytest.mark.legate


def reference(**options: Any) -> Any:
    return least_squares(residual, X0, jacobian, args=(T, Y), **options)


def cupynumeric() -> Any:
    from lmsolve.legate._start import start

    return start()


def hosts() -> tuple[Any, ...]:
    return (T, Y)


def residents() -> tuple[Any, ...]:
    xp = cupynumeric()
    return (xp.array(T), xp.array(Y))


def mixed() -> tuple[Any, ...]:
    return (cupynumeric().array(T), Y)


@pytest.mark.parametrize("data", [hosts, residents, mixed])
def test_every_kind_of_data_gives_the_fit_of_numpy(data: Any) -> None:
    expected = reference()
    result = least_squares(rows(residual, jacobian, n=3, data=data()), X0)
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-12)
    assert result.cost == pytest.approx(expected.cost, rel=1e-13)
    assert (result.nfev, result.njev) == (expected.nfev, expected.njev)
    np.testing.assert_allclose(result.standard_errors(), expected.standard_errors(), rtol=1e-9)


def test_rows_made_from_their_numbers() -> None:
    def numbered(x: Any, numbers: range) -> Any:
        part = slice(numbers.start, numbers.stop)
        return residual(x, T[part], Y[part]), jacobian(x, T[part], Y[part])

    made = rows(lambda x, i: numbered(x, i)[0], numbered, m=len(T), n=3, block_rows=100)
    np.testing.assert_allclose(least_squares(made, X0).x, reference().x, rtol=1e-12)


def test_memory_map_is_read_block_by_block(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.stack([T, Y], axis=1))
    table = np.load(tmp_path / "data.npy", mmap_mode="r")
    widest = [0]

    def fun(x: Any, block: Any) -> Any:
        widest[0] = max(widest[0], len(block))
        return residual(x, block[:, 0], block[:, 1])

    def jac(x: Any, block: Any) -> Any:
        return jacobian(x, block[:, 0], block[:, 1])

    result = least_squares(rows(fun, jac, n=3, data=[table], block_rows=64), X0)
    np.testing.assert_allclose(result.x, reference().x, rtol=1e-12)
    assert widest[0] == 64


def test_hdf5_files_are_read_by_h5py_and_by_legate(tmp_path: Path) -> None:
    """In a process of its own: h5py has to be imported before Legate, which has its own HDF5."""
    source = """
        import sys
        import h5py
        import numpy as np
        from lmsolve import least_squares
        from lmsolve.legate import rows
        from tests.decay import X0, T, Y, jacobian, residual

        with h5py.File(sys.argv[1], "w") as file:
            file["table"] = np.stack([T, Y], axis=1)

        def fit(table):
            fun = lambda x, block: residual(x, block[:, 0], block[:, 1])
            return least_squares(rows(fun, n=3, data=[table], block_rows=64), X0).x

        expected = least_squares(residual, X0, jacobian, args=(T, Y)).x
        with h5py.File(sys.argv[1]) as file:
            np.testing.assert_allclose(fit(file["table"]), expected, rtol=1e-7)
        from legate.io.hdf5 import from_file
        np.testing.assert_allclose(fit(from_file(sys.argv[1], "/table")), expected, rtol=1e-7)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), str(tmp_path / "data.h5")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("data", [hosts, residents])
@pytest.mark.parametrize("loss", ["linear", "soft_l1"])
def test_without_a_jacobian_the_tasks_take_differences(data: Any, loss: str) -> None:
    result = least_squares(rows(residual, n=3, data=data(), loss=loss, block_rows=100), X0)
    expected = reference(loss=loss)
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-7)
    if loss == "linear":
        np.testing.assert_allclose(result.standard_errors(), expected.standard_errors(), rtol=1e-5)
    assert result.nfev <= expected.nfev + 2


@pytest.mark.parametrize("data", [hosts, residents])
@pytest.mark.parametrize("loss", ["linear", "huber", "soft_l1", "cauchy", "arctan"])
def test_covariance_is_that_of_numpy(data: Any, loss: str) -> None:
    options = {"loss": loss, "f_scale": 0.01}
    sharded = rows(residual, jacobian, n=3, data=data(), block_rows=100, **options)
    result = least_squares(sharded, X0)
    expected = reference(**options)
    np.testing.assert_allclose(result.covariance(), expected.covariance(), rtol=1e-8)
    for sandwich in (True, False):
        np.testing.assert_allclose(
            result.covariance(sandwich=sandwich), expected.covariance(sandwich=sandwich), rtol=1e-8
        )
    assert result.rank == 3
    assert "std. error" in result.summary()


def test_covariance_of_held_parameters_and_of_float32() -> None:
    options = {"loss": "soft_l1", "f_scale": 0.01}
    fixed = [False, True, False]
    held = least_squares(rows(residual, jacobian, n=3, data=hosts(), **options), X0, fixed=fixed)
    expected = reference(fixed=fixed, **options)
    np.testing.assert_allclose(held.covariance(), expected.covariance(), rtol=1e-8)
    single = least_squares(rows(residual, jacobian, n=3, data=hosts(), **options), X0.astype("f4"))
    assert single.x.dtype == np.float32
    np.testing.assert_allclose(single.covariance(), reference(**options).covariance(), rtol=1e-3)


def test_degrees_of_freedom_count_the_residuals_of_every_row() -> None:
    def fun(x: Any, t: Any, y: Any) -> Any:
        r = residual(x, t, y)
        return np.stack([r, 0.1 * (x[0] * t - y)], axis=1)

    def jac(x: Any, t: Any, y: Any) -> Any:
        J = np.zeros((len(t), 2, 3))
        J[:, 0], J[:, 1, 0] = jacobian(x, t, y), 0.1 * t
        return J

    result = least_squares(rows(fun, jac, n=3, data=hosts()), X0)
    expected = least_squares(
        lambda x: fun(x, T, Y).ravel(), X0, lambda x: jac(x, T, Y).reshape(-1, 3)
    )
    assert result.uncertainty().dof == expected.uncertainty().dof == 2 * len(T) - 3
    np.testing.assert_allclose(result.covariance(), expected.covariance(), rtol=1e-8)


def test_differences_become_central_where_a_fit_needs_it() -> None:
    nist = load("Hahn1")  # certified to more digits than one-sided differences give

    def at(x: Any, i: range) -> Any:
        return nist.fun(x)[i.start : i.stop]

    sharded = rows(at, m=nist.m, n=nist.n, block_rows=50)
    result = least_squares(sharded, nist.starts[1])
    expected = least_squares(nist.fun, nist.starts[1])
    assert sharded.functions.differences.kind == "3-point"
    assert digits(result.x, nist.certified) >= digits(expected.x, nist.certified) - 1
    least_squares(sharded, nist.starts[1], max_nfev=2)
    assert sharded.functions.differences.kind == "2-point"  # a new fit begins anew


def test_differences_stay_inside_the_bounds_and_hold_what_is_fixed() -> None:
    lb, ub = np.array([0.0, 0.0, 0.6]), np.array([2.0, 5.0, 2.0])

    def fun(x: Any, t: Any, y: Any) -> Any:
        assert np.all((x >= lb) & (x <= ub))
        return residual(x, t, y)

    expected = reference(bounds=(lb, ub))
    result = least_squares(rows(fun, n=3, data=hosts()), X0, bounds=(lb, ub))
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-7)
    np.testing.assert_array_equal(result.active_mask, expected.active_mask)
    fixed = [False, True, False]
    held = least_squares(rows(residual, n=3, data=hosts()), X0, fixed=fixed)
    np.testing.assert_allclose(held.x, reference(fixed=fixed).x, rtol=1e-7)


def test_differences_of_torch_and_of_one_array_filled_again_and_again() -> None:
    import torch

    def fun(x: Any, t: Any, y: Any) -> Any:
        return x[0] * torch.exp(-x[1] * t) + x[2] - y

    sharded = rows(fun, n=3, data=hosts(), namespace="torch")
    np.testing.assert_allclose(least_squares(sharded, X0).x, reference().x, rtol=1e-7)
    kept = threading.local()

    def refilled(x: Any, t: Any, y: Any) -> Any:
        if getattr(kept, "r", None) is None or kept.r.shape != t.shape:
            kept.r = np.empty_like(t)
        kept.r[...] = residual(x, t, y)
        return kept.r

    sharded = rows(refilled, n=3, data=hosts(), block_rows=100)
    np.testing.assert_allclose(least_squares(sharded, X0).x, reference().x, rtol=1e-7)


SIGMA = 0.01 + 0.02 * T


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("resident", [True, False])
def test_deviations_weigh_the_rows(resident: bool, exact: bool) -> None:
    expected = least_squares(
        lambda x: residual(x, T, Y) / SIGMA, X0, lambda x: jacobian(x, T, Y) / SIGMA[:, None]
    )
    sigma = cupynumeric().array(SIGMA) if resident else SIGMA
    jac = jacobian if exact else None
    result = least_squares(rows(residual, jac, n=3, data=hosts(), sigma=sigma, block_rows=90), X0)
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-11 if exact else 1e-7)
    assert result.cost == pytest.approx(expected.cost, rel=1e-12)
    np.testing.assert_allclose(
        result.standard_errors(absolute_sigma=True),
        expected.standard_errors(absolute_sigma=True),
        rtol=1e-6,
    )


def test_deviations_of_numbered_rows_and_of_several_residuals() -> None:
    def fun(x: Any, i: range) -> Any:
        part = slice(i.start, i.stop)
        r = residual(x, T[part], Y[part])
        return np.stack([r, 0.1 * (x[0] * T[part] - Y[part])], axis=1)

    sigma = np.stack([SIGMA, 2.0 * SIGMA], axis=1)
    for each in (SIGMA, sigma):
        expected = least_squares(
            lambda x, each=each: (fun(x, range(len(T))) / each.reshape(len(T), -1)).ravel(), X0
        )
        result = least_squares(rows(fun, m=len(T), n=3, sigma=each, block_rows=77), X0)
        np.testing.assert_allclose(result.x, expected.x, rtol=1e-7)
    with pytest.raises(ValueError, match=r"`sigma` must have shape \(m,\) or \(m, 2\)"):
        least_squares(rows(fun, m=len(T), n=3, sigma=np.ones((len(T), 3))), X0)
    with pytest.raises(ValueError, match=r"`sigma` must have shape .* m = 1003, got \(3,\)"):
        rows(fun, m=len(T), n=3, sigma=np.ones(3))


def test_several_residuals_in_a_row() -> None:
    def fun(x: Any, t: Any, y: Any) -> Any:
        return np.stack([residual(x, t, y), 0.1 * (x[0] * t - y)], axis=1)

    def jac(x: Any, t: Any, y: Any) -> Any:
        second = np.zeros((len(t), 3))
        second[:, 0] = 0.1 * t
        return np.stack([jacobian(x, t, y), second], axis=1)

    expected = least_squares(
        lambda x: fun(x, T, Y).ravel(), X0, lambda x: jac(x, T, Y).reshape(-1, 3)
    )
    result = least_squares(rows(fun, jac, n=3, data=hosts()), X0)
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-12)


@pytest.mark.parametrize("loss", ["huber", "soft_l1", "cauchy", "arctan"])
def test_robust_losses(loss: str) -> None:
    y = Y.copy()
    y[::50] += 3.0
    expected = least_squares(residual, X0, jacobian, args=(T, y), loss=loss, f_scale=0.1)
    problem = rows(residual, jacobian, n=3, data=(T, y), loss=loss, f_scale=0.1)
    result = least_squares(problem, X0)
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-9)
    assert result.cost == pytest.approx(expected.cost, rel=1e-12)


def test_bounds_and_held_parameters() -> None:
    bounds = ([0.0, 0.0, 0.6], [2.0, 5.0, 2.0])
    expected = reference(bounds=bounds)
    result = least_squares(rows(residual, jacobian, n=3, data=hosts()), X0, bounds=bounds)
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-8)
    fixed = [False, True, False]
    held = least_squares(rows(residual, jacobian, n=3, data=hosts()), X0, fixed=fixed)
    np.testing.assert_allclose(held.x, reference(fixed=fixed).x, rtol=1e-10)


@pytest.mark.parametrize("name", ["Misra1a", "Thurber", "MGH09", "Eckerle4", "Rat43", "Hahn1"])
def test_certified_values_from_both_starts(name: str) -> None:
    nist = load(name)

    def at(x: Any, i: range) -> Any:
        return nist.fun(x)[i.start : i.stop], nist.jac(x)[i.start : i.stop]

    for start in nist.starts:
        sharded = rows(lambda x, i: at(x, i)[0], at, m=nist.m, n=nist.n, block_rows=7)
        assert digits(least_squares(sharded, start).x, nist.certified) >= 9


def test_ill_conditioned_rows_are_reduced_by_qr() -> None:
    A, b = nearly_dependent()
    sharded = rows(lambda x, A, b: A @ x - b, lambda x, A, b: A, n=4, data=(A, b), block_rows=60)
    result = least_squares(sharded, np.zeros(4))
    np.testing.assert_allclose(result.x, [1.0, 2.0, 3.0, 4.0], rtol=1e-6)
    assert result.rank == 4


def test_fewer_rows_than_processors_or_parameters() -> None:
    one = rows(lambda x, i: x - 2.0, lambda x, i: np.eye(1), m=1, n=1)
    assert least_squares(one, [1.0]).x == pytest.approx([2.0])
    A = np.array([[1.0, 2.0, 3.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
    wide = rows(lambda x, A: A @ x - 1.0, lambda x, A: A, n=4, data=(A,))
    expected = least_squares(lambda x: A @ x - 1.0, np.zeros(4), lambda x: A)
    assert least_squares(wide, np.zeros(4)).cost == pytest.approx(expected.cost, abs=1e-20)


def test_float32_blocks_are_summed_in_float64() -> None:
    sharded = rows(residual, jacobian, n=3, data=(T.astype("f4"), Y.astype("f4")), dtype="float32")
    np.testing.assert_allclose(least_squares(sharded, X0).x, reference().x, rtol=1e-5)


def test_one_launch_per_trial_and_one_more_per_accepted_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sharded = rows(residual, jacobian, n=3, data=residents())
    from lmsolve.legate import _tasks

    launches, reads = [0], [0]
    launch, read = _tasks.launch, _tasks.read

    def counted_launch(*arguments: Any, **keywords: Any) -> Any:
        launches[0] += 1
        return launch(*arguments, **keywords)

    def counted_read(store: Any) -> Any:
        reads[0] += 1
        return read(store)

    monkeypatch.setattr(_tasks, "launch", counted_launch)
    monkeypatch.setattr(_tasks, "read", counted_read)
    result = least_squares(sharded, X0)
    assert launches[0] == result.nfev + result.njev
    assert reads[0] == launches[0]  # the sums of a single rank are on the host already


@pytest.mark.parametrize("n", [3, 1500, 2500])
def test_sums_of_every_size_are_exact(n: int) -> None:
    """Read whole and added up on the host; added up by columns; made by panels."""
    A = np.random.default_rng(2).integers(-4, 5, (41, n)).astype(float)
    b = np.arange(41.0)
    sharded = rows(lambda x, A, b: b, lambda x, A, b: A, n=n, data=(A, b), block_rows=7)
    sub = sharded.linearize(np.zeros(n))
    np.testing.assert_array_equal(sub.gram, A.T @ A)
    np.testing.assert_array_equal(sub.grad, A.T @ b)


def test_repeated_sums_leave_nothing_in_the_pool() -> None:
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    J = np.ones((8, 1000))
    sharded = rows(lambda x, A: A[:, 0], lambda x, A: A, n=1000, data=(J,))
    for _ in range(5):
        sharded.linearize(np.zeros(1000))
    before = resident()
    for _ in range(20):
        sharded.linearize(np.zeros(1000))
    assert resident() - before < 100  # MB; a reduction of Legate's left 320


def test_exception_of_the_user_comes_back_as_it_was() -> None:
    class Refused(Exception):
        pass

    def fun(x: Any, t: Any, y: Any) -> Any:
        if t[-1] == T[-1]:
            raise Refused("the last shard")
        return residual(x, t, y)

    with pytest.raises(Refused, match="the last shard") as caught:
        least_squares(rows(fun, jacobian, n=3, data=hosts()), X0)
    assert "fun" in [entry.name for entry in caught.traceback]
    result = least_squares(rows(residual, jacobian, n=3, data=hosts()), X0)
    assert result.success


def test_exception_of_jac_comes_back_too() -> None:
    def jac(x: Any, t: Any, y: Any) -> Any:
        raise ZeroDivisionError("in jac")

    with pytest.raises(ZeroDivisionError, match="in jac"):
        least_squares(rows(residual, jac, n=3, data=hosts()), X0)


def test_exception_with_a_text_that_would_abort_legate_comes_back_whole() -> None:
    """Legate aborts the process where an exception pickles to more than 4,096 bytes."""

    def fun(x: Any, t: Any, y: Any) -> Any:
        raise RuntimeError("x" * 100_000)

    with pytest.raises(RuntimeError, match=r"^x{100000}$"):
        rows(fun, jacobian, n=3, data=hosts()).residual(X0)


def test_exceptions_travel_between_ranks_as_text() -> None:
    cupynumeric()
    from lmsolve.legate._tasks import TEXT, _decode, _encode

    class Picky(Exception):
        def __init__(self, code: int, reason: str) -> None:
            super().__init__(code, reason)

    for raised, kind, text in (
        (KeyError("row"), KeyError, "row"),
        (np.linalg.LinAlgError("singular"), np.linalg.LinAlgError, "singular"),
        (Picky(3, "why"), RuntimeError, "Picky: (3, 'why')"),
        (ValueError("é" * 50_000), ValueError, "é" * 10),
    ):
        encoded = _encode(raised)
        assert len(encoded) <= TEXT
        decoded = _decode(encoded)
        assert type(decoded) is kind
        assert text in str(decoded.args[0])
        assert "another rank" in decoded.__notes__[0]


@pytest.mark.parametrize("trouble", ["nan", "singular"])
def test_trouble_in_one_shard_rejects_the_step(trouble: str) -> None:
    seen = []

    def fun(x: Any, t: Any, y: Any) -> Any:
        if x[1] > 1.25 and len(seen) < 2 and t[-1] == T[-1]:
            seen.append(x[1])
            if trouble == "singular":
                raise np.linalg.LinAlgError("singular in a task")
            return np.full_like(t, np.nan)
        return residual(x, t, y)

    result = least_squares(rows(fun, jacobian, n=3, data=hosts()), X0)
    assert seen
    assert sum(not trial.accepted for trial in result.history) >= len(seen)
    np.testing.assert_allclose(result.x, reference().x, rtol=1e-9)


def test_wrong_shapes_are_told() -> None:
    with pytest.raises(ValueError, match=r"`fun_block` must return one residual or more"):
        least_squares(rows(lambda x, t, y: x, jacobian, n=3, data=hosts()), X0)
    with pytest.raises(ValueError, match=r"`jac_block` must return"):
        least_squares(rows(residual, lambda x, t, y: np.ones((len(t), 2)), n=3, data=hosts()), X0)


def test_bad_arguments_are_told_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="`m`, the number of rows"):
        rows(residual, jacobian, n=3)
    with pytest.raises(ValueError, match=r"`data` must have m = 5 rows"):
        rows(residual, jacobian, n=3, m=5, data=hosts())
    with pytest.raises(ValueError, match="`namespace` must be"):
        rows(residual, jacobian, n=3, data=hosts(), namespace="jax")
    with pytest.raises(ValueError, match="`loss` must be"):
        rows(residual, jacobian, n=3, data=hosts(), loss="cubic")


def test_memory_that_is_not_there_is_refused_before_the_launch() -> None:
    n = 1_000_000
    sharded = rows(lambda x, i: x[: len(i)], lambda x, i: None, m=100, n=n)
    with pytest.raises(MemoryError, match=r"The sums J'J need 16000.02 GB, and .* are free"):
        sharded.linearize(np.zeros(n))


def test_the_option_to_raise_is_named_with_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGATE_CONFIG", "--cpus 2 --sysmem 1000")
    require(2**30 - 2**27, "sysmem", "Data")
    with pytest.raises(MemoryError, match=r"Data need 2.15 GB .* has 1.05 GB: .* --sysmem 2253"):
        require(2**31, "sysmem", "Data")


def test_shards_of_one_process_run_at_the_same_time() -> None:
    if cpus() < 2:
        pytest.skip("one CPU")
    together = threading.Barrier(2, timeout=30)

    def fun(x: Any, i: range) -> Any:
        together.wait()  # breaks if one shard waits for the other to end
        return np.zeros(len(i))

    assert rows(fun, fun, m=2, n=1, block_rows=1).residual(np.zeros(1)).cost == 0.0


def cpus() -> int:
    cupynumeric()
    from legate.core import TaskTarget

    from lmsolve.legate._tasks import processors

    return processors(TaskTarget.CPU)


class Network:
    """A torch module behind `functional_call`, which two threads may not share."""

    def __init__(self) -> None:
        import torch

        torch.manual_seed(0)
        self.module = torch.nn.Sequential(
            torch.nn.Linear(1, 5, dtype=torch.float64),
            torch.nn.Tanh(),
            torch.nn.Linear(5, 1, dtype=torch.float64),
        )
        self.threads: set[int] = set()

    def flat(self) -> np.ndarray:
        import torch

        return torch.nn.utils.parameters_to_vector(self.module.parameters()).detach().numpy()

    def fun(self, x: Any, t: Any, y: Any) -> Any:
        import torch

        self.threads.add(threading.get_ident())
        assert len(self.threads) == 1, "one copy per thread"
        parameters, start = {}, 0
        for name, value in self.module.named_parameters():
            parameters[name] = x[start : start + value.numel()].reshape(value.shape)
            start += value.numel()
        time.sleep(0)
        return torch.func.functional_call(self.module, parameters, (t[:, None],))[:, 0] - y

    def jac(self, x: Any, t: Any, y: Any) -> Any:
        import torch

        return torch.func.jacrev(self.fun)(x, t, y)


def test_torch_modules_are_copied_for_each_thread() -> None:
    import torch

    network = Network()
    x0 = network.flat()
    sharded = rows(
        network.fun, network.jac, n=x0.size, data=residents(), namespace="torch", block_rows=50
    )
    t, y = torch.from_numpy(T), torch.from_numpy(Y)
    single = Network()
    J = single.jac(torch.from_numpy(x0), t, y).numpy()
    np.testing.assert_allclose(sharded.linearize(x0).gram, J.T @ J, rtol=1e-12, atol=1e-9)
    result = least_squares(sharded, x0, max_nfev=10)
    assert network.threads == set()  # the original was never called
    r = single.fun(torch.from_numpy(result.x), t, y)
    assert result.cost == pytest.approx(float(0.5 * r @ r), rel=1e-12)


def test_torch_takes_host_data_and_losses() -> None:
    import torch

    def fun(x: Any, t: Any, y: Any) -> Any:
        return x[0] * torch.exp(-x[1] * t) + x[2] - y

    def jac(x: Any, t: Any, y: Any) -> Any:
        e = torch.exp(-x[1] * t)
        return torch.stack([e, -x[0] * t * e, torch.ones_like(t)], dim=1)

    for options in ({}, {"loss": "huber", "f_scale": 0.01}):
        sharded = rows(fun, jac, n=3, data=hosts(), namespace="torch", **options)
        np.testing.assert_allclose(least_squares(sharded, X0).x, reference(**options).x, rtol=1e-9)


def test_a_checkpoint_goes_on_from_where_it_was() -> None:
    sharded = rows(residual, jacobian, n=3, data=hosts())
    first = least_squares(sharded, X0, max_nfev=3)
    result = least_squares(sharded, X0, resume=first.state)
    np.testing.assert_allclose(result.x, reference().x, rtol=1e-10)
