"""Checkpoints: a run that was saved, loaded and resumed is the one never interrupted."""

import numpy as np
import pytest

from lmsolve import LevenbergMarquardt, LMState, _subproblem, least_squares
from lmsolve._damping import Damping
from lmsolve._lm import LACKING
from lmsolve._problem import Problem
from tests.nist import load
from tests.problems import PROBLEMS
from tests.tools import Decay

FINAL = ("x", "cost", "scale", "damping", "nfev", "njev", "nit", "status", "value", "polished")
FINAL += ("doubts", "central", "linearized", "fired", "ratio", "length", "trail", "curvature")
HAHN, ROSZMAN, LANCZOS, BENNETT = (load(n) for n in ("Hahn1", "Roszman1", "Lanczos3", "Bennett5"))
MISRA = load("Misra1a")
WOOD, DECAY = PROBLEMS["wood"], Decay()
RUNS = {
    "exact": (HAHN.fun, HAHN.starts[1], {"jac": HAHN.jac}),
    "a long polish": (LANCZOS.fun, LANCZOS.starts[1], {"jac": LANCZOS.jac}),
    "differences that turn central": (ROSZMAN.fun, ROSZMAN.starts[0], {}),
    "many rejections": (WOOD.fun, WOOD.x0, {"jac": WOOD.jac}),
    "bounds": (DECAY.fun, DECAY.x0, {"bounds": ([0, 0, 0], [2.0, 5, 5])}),
    "loss": (DECAY.fun, DECAY.x0, {"loss": "soft_l1", "f_scale": 0.02}),
    "stretched steps": (
        MISRA.fun,
        MISRA.certified * 1.05,
        {"jac": MISRA.jac, "loss": "huber", "f_scale": 0.05},
    ),
    "scale": (DECAY.fun, DECAY.x0, {"x_scale": [1.0, 2.0, 0.5]}),
    "wide": (lambda x: np.array([x[0] * x[1] - 1, x[1] + x[2] ** 2 - 3]), [1.0, 2, 3], {}),
    "single precision": (
        lambda x: DECAY.fun(x).astype(np.float32),
        DECAY.x0.astype(np.float32),
        {},
    ),
}


def same(a, b):
    """Equality to the last bit, of anything that a state holds."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(u, v) for u, v in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return a == b


@pytest.mark.parametrize("name", RUNS)
def test_resumed_equals_uninterrupted(name, tmp_path):
    fun, x0, options = RUNS[name]
    states = []

    def keep(intermediate_result):
        states.append(intermediate_result.state)

    whole = least_squares(fun, x0, callback=keep, **options)
    assert whole.success and len(states) == whole.nit
    if name == "differences that turn central":
        assert whole.state.central
    if name == "stretched steps":
        assert any(s.curvature < LACKING for s in states)
    if name in ("exact", "a long polish"):
        assert any(len(s.trail) > 1 for s in states)
    for state in states:
        state.save(tmp_path / "state.npz")
        resumed = least_squares(fun, x0, resume=LMState.load(tmp_path / "state.npz"), **options)
        for field in FINAL:
            assert same(getattr(resumed.state, field), getattr(whole.state, field)), field
        assert (resumed.nfev, resumed.njev, resumed.nit) == (whole.nfev, whole.njev, whole.nit)
        assert resumed.message == whole.message
        np.testing.assert_array_equal(resumed.grad, whole.grad)


def test_resumed_equals_uninterrupted_where_a_step_asked_for_the_normal_matrix(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(_subproblem, "LARGE", 1)
    monkeypatch.setattr(_subproblem, "HEAVY", 0.0)
    test_resumed_equals_uninterrupted("a long polish", tmp_path)


def test_resumed_after_any_trial_rejected_ones_too(tmp_path):
    def problem():
        return Problem(np, WOOD.fun, WOOD.jac)

    solver, whole = LevenbergMarquardt(), []
    p = problem()
    state = solver.init(p, WOOD.x0)
    while state.status is None:
        state = solver.step(p, state)
        whole.append(state)
    assert any(not s.accepted for s in whole[:-1])
    for k, kept in enumerate(whole[:-1]):
        kept.save(tmp_path / "state.npz")
        p = problem()
        state = solver.resume(p, LMState.load(tmp_path / "state.npz"))
        for expected in whole[k + 1 :]:
            state = solver.step(p, state)
            assert same((state.x, state.damping), (expected.x, expected.damping))
            for counter in ("nfev", "njev", "nit", "status", "doubts", "fired"):
                assert getattr(state, counter) == getattr(expected, counter)


def test_an_interrupted_run_goes_on_from_the_state_of_its_callback():
    kept, calls = [], []

    def fun(x):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return HAHN.fun(x)

    def keep(intermediate_result):
        kept.append(intermediate_result.state)

    with pytest.raises(KeyboardInterrupt):
        least_squares(fun, HAHN.starts[0], callback=keep)
    resumed = least_squares(fun, HAHN.starts[0], resume=kept[-1])
    whole = least_squares(HAHN.fun, HAHN.starts[0])
    assert resumed.success
    np.testing.assert_array_equal(resumed.x, whole.x)
    assert resumed.nfev == whole.nfev


@pytest.mark.parametrize("limit", [1, 7, 20, 33])
def test_max_nfev_counts_over_interruptions(limit):
    def ignore(x):
        """A callback, so that every run takes the general path."""

    whole = least_squares(WOOD.fun, WOOD.x0, WOOD.jac, callback=ignore)
    first = least_squares(WOOD.fun, WOOD.x0, WOOD.jac, callback=ignore, max_nfev=limit)
    assert (first.status, first.nfev) == (0, limit)
    again = least_squares(WOOD.fun, WOOD.x0, WOOD.jac, resume=first.state, max_nfev=limit)
    assert (again.status, again.nfev, again.njev) == (0, limit, first.njev)
    second = least_squares(WOOD.fun, WOOD.x0, WOOD.jac, resume=first.state)
    np.testing.assert_array_equal(second.x, whole.x)
    assert (second.nfev, second.njev, second.nit) == (whole.nfev, whole.njev, whole.nit)


def test_resume_with_other_data_renews_the_cost():
    def problem(y):
        return Problem(np, lambda x: x - y, lambda x: np.eye(2))

    solver = LevenbergMarquardt()
    first = problem(np.array([1.0, 2.0]))
    state = solver.step(first, solver.init(first, np.ones(2)))
    other = problem(np.array([5.0, 5.0]))
    renewed = solver.resume(other, state)
    assert renewed.cost == 0.5 * np.sum((state.x - 5.0) ** 2) != state.cost
    assert renewed.status is None and renewed.damping == state.damping
    assert same(renewed.scale, state.scale)
    while renewed.status is None:
        renewed = solver.step(other, renewed)
    np.testing.assert_allclose(renewed.x, 5.0)


def test_every_field_survives(xp, tmp_path):
    x, p = xp.array([1.0, 2.0]), xp.array([0.1, -0.2])
    state = LMState(
        x=x, cost=0.25, scale=p, damping=Damping(1.5, 1e-3), nfev=7, njev=5, nit=4,
        accepted=False, ratio=-0.5, length=0.1, fired=2, value=1e-9, limit=1e-8, polished=3,
        doubts=1, escalated=True, central=True, linearized=True,
        trail=((x, p), (p, x)), status=2, point="never",
    )  # fmt: skip
    state.save(tmp_path / "state.npz")
    loaded = LMState.load(tmp_path / "state.npz", like=x)
    assert loaded.point is None
    for field in set(LMState._fields) - {"x", "scale", "trail", "point"}:
        assert getattr(loaded, field) == getattr(state, field), field
        assert type(getattr(loaded, field)) is type(getattr(state, field)), field
    assert same(xp.host(loaded.x), xp.host(x)) and same(xp.host(loaded.scale), xp.host(p))
    for pair, expected in zip(loaded.trail, state.trail, strict=True):
        assert same(tuple(map(xp.host, pair)), tuple(map(xp.host, expected)))


def test_a_state_before_the_first_step(tmp_path):
    state = LMState(x=np.ones(2), cost=1.0, scale=None, damping=Damping(0.0))
    state.save(tmp_path / "state.npz")
    loaded = LMState.load(tmp_path / "state.npz")
    assert loaded.scale is None and loaded.status is None and loaded.trail == ()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.npz"
    state = LMState(x=np.ones(2), cost=1.0, scale=None, damping=Damping(0.0))
    state.save(path)
    with pytest.raises(ValueError, match="allow_pickle"):
        state._replace(x=np.array([object()])).save(path)
    assert LMState.load(path).cost == 1.0
    assert [f.name for f in tmp_path.iterdir()] == ["state.npz"]


def test_another_format_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.ones(2))
    with pytest.raises(ValueError, match="format"):
        LMState.load(tmp_path / "other.npz")
