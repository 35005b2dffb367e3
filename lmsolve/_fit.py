"""One fit: from the caller's arguments to a problem, a run over the step-wise solver, a result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import OptimizeResult

from . import _bounds, _complex, _history, _hooks, _numdiff, _validate
from ._functions import ResidualAndJacobian, UserFunction, Wrapped, is_problem
from ._lm import DIFFERENCE_ERROR, LevenbergMarquardt, difference_share
from ._numdiff import Differences
from ._problem import Problem, StreamedProblem
from ._result import Context, LeastSquaresResult
from ._state import LMState
from ._status import CALLBACK, message
from ._subproblem import NormalEquations
from ._sums import LOCAL
from ._tiny import PARAMETERS as TINY
from ._tiny import REACH, Descent
from ._xp import (
    Array,
    Namespace,
    array_namespace,
    convert,
    copied,
    eps,
    is_complex,
    is_first_rank,
    is_numpy,
    to_numpy,
)

UNBOUNDED = (-np.inf, np.inf)
#: Two Jacobians by differences, of points 1e-6 apart, do not differ by this.
OTHER_FUNCTION = 1e-3
#: ftol, xtol and gtol.
TOLERANCES = (1e-8, 1e-8, 1e-8)


class Options(NamedTuple):
    """How the residuals are weighed and differentiated, as the caller said it."""

    jac: Any = "2-point"
    loss: Any = "linear"
    f_scale: Any = 1.0
    diff_step: Any = None
    tr_solver: Any = None
    tr_options: Any = None
    jac_sparsity: Any = None
    workers: Any = None
    sums: Any = LOCAL


class Fit:
    """One call: from the caller's arguments to a problem, a run and a result."""

    def __init__(
        self,
        fun: Any,
        x: Array,
        bounds: Any,
        fixed: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
        options: Options,
        names: Sequence[str] | None,
    ) -> None:
        self.xp: Namespace = array_namespace(x)
        self.names = names
        self.options = options
        self.fun, self.fixed = fun, fixed
        self.words = fun.words if isinstance(fun, Wrapped) else Wrapped.words
        self.complex_x = is_complex(x)
        self.complex_r = False
        if names is not None and len(names) != x.shape[0]:
            raise ValueError(f"`names` must name {x.shape[0]} parameters, got {len(names)}.")
        if self.complex_x:
            if np.isfinite(_validate.host_bounds(bounds, x.shape[0])).any():
                raise ValueError(
                    f"`bounds` must be infinite where `x0` is complex, got {bounds!r}."
                )
            fixed = None if fixed is None else np.tile(_validate.fixed_mask(fixed, x.shape[0]), 2)
            x = _complex.split(x)
        self.x0 = x
        self.box: _bounds.Box | None = None
        n = x.shape[0]
        if bounds is UNBOUNDED and fixed is None:
            self.lb, self.ub = _validate.unbounded(n)
        elif self.complex_x:
            self.box, self.lb, self.ub = _validate.box(UNBOUNDED, fixed, x)
        else:
            self.box, self.lb, self.ub = _validate.box(bounds, fixed, x, names)
        self.problem, self.r0 = self._problem(args, kwargs)

    # -- the problem ---------------------------------------------------------------------------

    def _problem(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The problem and its residuals at x0."""
        o = self.options
        if is_problem(self.fun):
            getattr(self.fun, "begin", lambda *start: None)(self.x0, self.lb, self.ub)
            return self.fun, None
        if not callable(self.fun):
            raise TypeError(f"`fun` must be callable, got {type(self.fun).__name__}.")
        if not isinstance(args, tuple):
            args = tuple(args) if isinstance(args, list) else (args,)
        if kwargs is not None and not isinstance(kwargs, dict):
            raise TypeError(f"`kwargs` must be a dict, got {type(kwargs).__name__}.")
        loss = _validate.loss_function(o.loss, o.f_scale)
        _validate.one_of(o.tr_solver, "tr_solver", _validate.TR_SOLVERS)
        if not callable(o.jac) and o.jac is not True:
            if isinstance(o.jac, bool) or not isinstance(o.jac, str):
                raise ValueError(
                    f"`jac` must be '2-point', '3-point', 'cs', True or a callable, got {o.jac!r}."
                )
            _validate.one_of(o.jac, "jac", _validate.DIFFERENCES)
        fun = UserFunction(self.fun, args, kwargs or {}, "fun")
        first: Any = None
        if o.jac is True:
            both = ResidualAndJacobian(fun)
            r0 = both(self.x0)
            return self._array_problem(both, both.jac, r0, loss)
        argument = _complex.join(self.x0) if self.complex_x else self.x0
        first = fun.function(
            argument.copy() if type(argument) is np.ndarray else argument, *args, **fun.kwargs
        )
        jac: Callable[[Array], Any] | None = None
        if callable(o.jac):
            jac = UserFunction(o.jac, args, fun.kwargs, "jac").raw
        if hasattr(first, "__next__"):
            return self._streamed(fun, jac, loss), None
        r0 = fun.residuals(first, self.x0)
        if self.complex_x or is_complex(r0):
            self.complex_r = True
            if o.jac == "cs":
                raise ValueError(
                    "`jac` must not be 'cs' where the residuals or `x0` are complex, got 'cs'."
                )
            real = _complex.RealFunction(fun, self.complex_x)
            r0 = _complex.split(r0 + 0j)
            jac = None if jac is None else _complex.real_jacobian(jac, self.complex_x)
            return self._array_problem(real, jac, r0, loss)
        return self._array_problem(fun, jac, r0, loss)

    def _streamed(self, fun: UserFunction, jac: Any, loss: Any) -> StreamedProblem:
        if jac is None:
            raise ValueError(
                "`jac` must be a callable that iterates over (residuals, rows) blocks where `fun` "
                f"iterates over blocks of residuals, got {self.options.jac!r}."
            )
        return StreamedProblem(self.xp, fun.raw, jac, loss, self.options.sums)

    def _array_problem(self, fun: Any, jac: Any, r0: Array, loss: Any) -> tuple[Problem, Array]:
        """Problem of arrays; its residuals are checked and brought to the dtype of x0."""
        o, x = self.options, self.x0
        if r0.shape[0] == 0:
            raise ValueError("`fun` must return at least one residual, got none.")
        precision = eps(self.xp, x.dtype)
        _validate.finite_residuals(r0, *self.words)
        if r0.dtype is not x.dtype and r0.dtype != x.dtype:
            precision = max(precision, eps(self.xp, r0.dtype))
            r0 = array_namespace(r0).astype(r0, x.dtype)
            if not is_numpy(self.xp):
                fun = _cast(fun, x.dtype, self.xp)
        if is_numpy(self.xp) and hasattr(fun, "expect"):
            fun.expect(r0.shape, x.dtype)
        if loss is not None:
            _validate.loss_values(loss, r0)
        differences = self._differences(jac, precision) if jac is None else None
        sparsity = self._sparsity(r0.shape[0]) if jac is None else None
        if jac is not None and o.tr_options:
            _validate.iterative_options(o.tr_solver, o.tr_options)
        problem = Problem(
            self.xp,
            fun,
            jac,
            differences=differences,
            loss=loss,
            sparsity=sparsity,
            linear_solver=self._linear_solver(),
            precision=precision,
            sums=o.sums,
            m=r0.shape[0],
            nfev=1,
            first=r0,
        )
        return problem, copied(r0)

    def _linear_solver(self) -> Any:
        o = self.options
        if o.tr_options is None and o.tr_solver is None:
            return None
        options = _validate.iterative_options(o.tr_solver, o.tr_options)
        options.pop("regularize", None)
        return (o.tr_solver, options)

    def _differences(self, jac: Any, precision: float) -> Differences:
        o = self.options
        typical = np.array([abs(v) or 1.0 for v in to_numpy(self.x0).tolist()])
        if self.box is None and o.diff_step is None:
            return Differences(o.jac, typical, precision)
        step = _validate.difference_step(o.diff_step, typical.shape[0])
        bounded = self.box is not None
        held = (self.lb == self.ub) if bounded else None
        return Differences(
            o.jac,
            typical,
            precision,
            lb=self.lb if bounded else None,
            ub=self.ub if bounded else None,
            held=held if held is not None and held.any() else None,
            rel_step=step,
        )

    def _sparsity(self, m: int) -> Any:
        structure = self.options.jac_sparsity
        if structure is None:
            return None
        if self.options.tr_solver == "exact":
            raise ValueError("`tr_solver` must not be 'exact' where `jac_sparsity` is given.")
        found = _numdiff.sparsity(structure)
        expected = (m, self.x0.shape[0])
        if found.shape != expected:
            raise ValueError(
                f"`jac_sparsity` must have shape (m, n) = {expected}, got {found.shape}."
            )
        return found

    # -- the run -------------------------------------------------------------------------------

    def run(
        self,
        tolerances: tuple[Any, Any, Any] = TOLERANCES,
        x_scale: Any = None,
        max_nfev: Any = None,
        polish: bool = True,
        verbose: int = 0,
        callback: Any = None,
        resume: LMState | None = None,
        defers: bool = False,
    ) -> LMState:
        """The last state of a run from x0, or from the state to resume.

        If it ``defers``, the linearisation may be that of a point close by; see `_tiny`.
        """
        problem, x = self.problem, self.x0
        precision = getattr(problem, "precision", eps(self.xp, x.dtype))
        f, s, g = _validate.tolerances(*tolerances, precision)
        self.solver = LevenbergMarquardt(
            ftol=f,
            xtol=s,
            gtol=g,
            max_nfev=_validate.evaluations(max_nfev, x.shape[0]),
            x_scale=_validate.scales(x_scale, x),
            bounds=self.box,
            polish=polish,
        )
        if isinstance(problem, Problem):
            problem.norms_needed = isinstance(x_scale, str)
        self.history: list[_history.Iteration] = []
        notify = _hooks.notifier(callback)
        verbose = verbose if verbose and is_first_rank() else 0
        if self.options.workers is None:
            return self._run(notify, verbose, resume, defers)
        with _hooks.Workers(self.options.workers, problem):
            return self._run(notify, verbose, resume, defers)

    def _run(self, notify: Any, verbose: int, resume: LMState | None, defers: bool) -> LMState:
        """Loop over the step-wise solver."""
        problem, solver, history = self.problem, self.solver, self.history
        at_once = resume is None and notify is None  # nobody takes a state on the way to go on from
        if at_once and verbose < 2 and self._is_tiny(solver):
            descent = Descent(solver, problem, self.x0, self.r0, history, defers)
            first_cost, state = descent.cost, descent.run()
        else:
            state = self._start(solver, resume)
            first_cost = state.cost
        if verbose == 2:
            print(_history.HEADER)
        while state.status is None:
            before = state
            state = solver.step(problem, state)
            if state.nfev > before.nfev:  # the last step may end the run without a trial
                history.append(_history.iteration(state, _history.is_polish(before, state)))
                if verbose == 2:
                    print(_history.line(history[-1]))
            if state.nit > before.nit and notify is not None and notify(self._intermediate(state)):
                state = state._replace(status=CALLBACK)
            if defers and state.fired and state.status is None:
                state = self._near(before.x, state) or state
            if at_once and state.fired and self._serves(before.x, state):
                problem.reuse(problem.J)
                state = state._replace(njev=state.njev - 1)  # the solver counts it again
        if state.point.subproblem is None:
            state = solver.linearize(problem, state)
        if verbose:
            print(message(state))
            print(
                f"Function evaluations {state.nfev}, initial cost {first_cost:.4e}, final cost "
                f"{state.cost:.4e}, first-order optimality {self._first_order(state)[0]:.2e}."
            )
        return state

    def _near(self, before: np.ndarray, state: LMState) -> LMState | None:
        """The ended state of a fit by differences that is settled, or None.

        Its linearisation is that of the point before; see `_history.settled_reach`.
        """
        problem, history = self.problem, self.history
        if not self._differenced() or problem.loss is not None or len(history) < 2:
            return None
        if not self.solver.polish:
            return None
        error, x, D = problem.derivative_error(), state.x, to_numpy(state.scale)
        reach = _history.settled_reach(history[-2], history[-1], error)
        if not reach or not (np.abs(x - before) <= reach * np.abs(x)).all():
            return None
        sub = problem.sums.subproblem(self.xp, problem.J, state.point.residual, None)
        noise = error * math.sqrt(2.0 * state.cost) * difference_share(problem.J.shape[0])
        pivot = sub.smallest_pivot(1.0 / D) if isinstance(sub, NormalEquations) else 0.0
        if noise > DIFFERENCE_ERROR * pivot * (np.abs(x) * D).min():
            return None
        return state._replace(status=state.fired, point=state.point._replace(subproblem=sub))

    def _serves(self, before: np.ndarray, state: LMState) -> bool:
        """Whether the Jacobian by differences before the last step will do after it too."""
        if state.point.subproblem is not None or not self._differenced():
            return False
        return bool((np.abs(state.x - before) <= REACH * np.abs(state.x)).all())

    def _differenced(self) -> bool:
        """Whether the Jacobian is a NumPy array of plain one-sided differences."""
        problem = self.problem
        if type(problem) is not Problem or type(problem.J) is not np.ndarray:
            return False
        return problem.differences is not None and problem.differences.is_plain()

    def _start(self, solver: LevenbergMarquardt, resume: LMState | None) -> LMState:
        """The state to step from."""
        if resume is None:
            return solver.init(self.problem, self.x0, self.r0)
        if isinstance(resume, LMState):
            return solver.resume(self.problem, resume.moved(self.x0))
        raise TypeError(f"`resume` must be an LMState, got {type(resume).__name__}.")

    def _is_tiny(self, solver: LevenbergMarquardt) -> bool:
        """Whether the n-sized work is cheaper in Python floats."""
        p = self.problem
        return (
            self.x0.shape[0] <= TINY
            and solver.x_scale is None
            and type(p) is Problem
            and p.sums.covers(p.m or 0, self.x0.shape[0])
            and self.box is None
            and p.loss is None
            and p.sparsity is None
            and p.linear_solver is None
            and is_numpy(self.xp)
            and self.x0.dtype == np.float64
            and self.options.workers is None
        )

    def _intermediate(self, state: LMState) -> OptimizeResult:
        x, r = state.x, state.point.residual
        if self.complex_x:
            x = _complex.join(x)
        if type(x) is np.ndarray:
            x = x.copy()
        return OptimizeResult(
            x=x,
            fun=r,
            cost=state.cost,
            nit=state.nit,
            nfev=state.nfev,
            njev=state.njev,
            state=state,
        )

    def result(self, state: LMState, absolute_sigma: bool = False) -> LeastSquaresResult:
        """The result of the last state of `run`."""
        if not state.linearized:
            state = self._linearized(state)
        problem, sub, x = self.problem, state.point.subproblem, state.x
        r, J = state.point.residual, getattr(problem, "J", None)
        optimality, active, held = self._first_order(state)
        is_array_r = hasattr(r, "shape")
        fun = r if is_array_r else None
        status = state.status if state.status is not None else 0
        result = LeastSquaresResult(
            x=x.copy() if type(x) is np.ndarray else x,  # the caller may change its units in place
            cost=state.cost,
            fun=fun,
            jac=J,
            grad=sub.grad,
            optimality=optimality,
            active_mask=active,
            nfev=state.nfev,
            njev=state.njev,
            nit=state.nit,
            status=status,
            message=message(state),
            success=status > 0,
            history=self.history,
            state=state,
        )
        reduces = hasattr(problem, "curvature_rows")
        context = Context(
            m=getattr(problem, "m", None) or (r.shape[0] if is_array_r else 0),
            loss=getattr(problem, "loss", None),
            xp=self.xp,
            held=held,
            lb=self.lb,
            ub=self.ub,
            gram=getattr(sub, "gram", None) if J is None else None,
            refit=partial(_refit, problem, self.xp, x, self.lb, self.ub, self.solver),
            names=self.names,
            absolute_sigma=absolute_sigma,
            rank=sub.rank() if hasattr(sub, "rank") else None,
            reduced=partial(problem.curvature_rows, x, r, J) if reduces else None,
            columns=partial(problem.columns, x, r, J) if hasattr(problem, "columns") else None,
        )
        object.__setattr__(result, "_context", context)
        if self.complex_x or self.complex_r:
            self._to_complex(result)
        return result

    def _first_order(self, state: LMState) -> tuple[float, np.ndarray, np.ndarray]:
        """Optimality, active mask (n,) and mask (n,) of held parameters at a linearised state."""
        g, n = to_numpy(state.point.subproblem.grad), state.x.shape[0]
        if self.box is None:
            none = np.zeros(n, dtype=int)
            return float(np.maximum.reduce(np.abs(g))), none, none.astype(bool)
        x, g = to_numpy(state.x).astype(float), g.astype(float)
        D = to_numpy(state.point.D).astype(float)
        reach = self.solver.xtol * float(np.linalg.norm(D * x)) / D
        active = _bounds.active_mask(x, self.lb, self.ub, g, reach)
        close = (active != 0) & (x > self.lb) & (x < self.ub)
        optimality = _bounds.optimality(x, g, self.lb, self.ub)
        return optimality, active, np.asarray(to_numpy(state.point.d) == 0) | close

    def _linearized(self, state: LMState) -> LMState:
        """The state of a run that deferred, with its linearisation.

        The function is called again, perhaps long after the run. Where it is another one by then
        (an array that was filled anew, a variable of a loop), its differences have nothing to do
        with the Jacobian of the point before, which serves instead, as it did for `pcov`.
        """
        near = np.array(self.problem.J)
        full = self.solver.linearize(self.problem, state)
        moved = np.abs(self.problem.J - near).max(axis=0)
        if (moved <= OTHER_FUNCTION * np.abs(near).max(axis=0)).all():
            return full
        self.problem.J = near
        self.problem.reuse(near)
        return self.solver.linearize(self.problem, state)

    def _to_complex(self, result: LeastSquaresResult) -> None:
        """x, fun, jac and grad of a result put back into complex form."""
        result._known().real = (result.jac, result.fun)
        result.fun = _complex.join(result.fun)
        if result.jac is not None:
            result.jac = _complex.complex_jacobian(result.jac, self.complex_x)
        if self.complex_x:
            result.x, result.grad = _complex.join(result.x), _complex.join(result.grad)
            n = result.x.shape[0]
            result.active_mask = result.active_mask[:n]


def _refit(
    problem: Any,
    xp: Namespace,
    like: Array,
    lb: np.ndarray,
    ub: np.ndarray,
    solver: LevenbergMarquardt,
    start: np.ndarray,
    fixed: np.ndarray,
) -> tuple[float, np.ndarray]:
    """Cost and parameters of the same problem with some parameters held at their start."""
    all_fixed = bool(fixed.all())
    box = None if all_fixed else _validate.box((lb, ub), fixed, convert(start, like))[0]
    if isinstance(problem, Problem) and problem.differences is not None:
        problem = replace(
            problem, differences=replace(problem.differences, held=fixed), _buffer=None
        )
    run = solver.copy(bounds=box)
    x = convert(start, like)
    try:
        state = run.init(problem, x)
    except ValueError:
        return math.inf, start
    if all_fixed:
        return state.cost, start
    while state.status is None:
        state = run.step(problem, state)
    return state.cost, to_numpy(state.x).astype(float)


def _cast(fun: Callable[[Array], Array], dtype: Any, xp: Namespace) -> Callable[[Array], Array]:
    """``fun`` with its residuals brought to the dtype of x0."""
    return lambda x: xp.astype(fun(x), dtype)
