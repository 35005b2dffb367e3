"""The history of a run: one entry for each trial, and how it is printed."""

from __future__ import annotations

from typing import NamedTuple

from ._state import LMState

#: A fit by differences needs no last look if its steps shrink so fast that the next one is below
#: the error of a difference, and the last one was at most CLOSE of each parameter: 128 difference
#: steps. Nor does `curve_fit` need differences at the solution then: the covariance moves by some
#: 1e-6 of itself, as with MINPACK, whose last Jacobian is that before the last step too.
FAST, CLOSE = 0.1, 128.0 * 2.0**-26


class Iteration(NamedTuple):
    """One trial of a run, as kept in ``result.history``.

    Attributes
    ----------
    nfev, nit : int
        Residual evaluations and accepted steps so far.
    cost : float
        Cost at the best point so far.
    accepted : bool
        Whether the trial was accepted.
    ratio : float
        Actual over predicted decrease.
    radius, damping : float
        Trust radius after the trial, and damping of its step.
    length : float
        Scaled length of the step.
    polishing : bool
        Whether the trial was an undamped polishing step.
    escalated : bool
        Whether the normal equations were too ill-conditioned for the step, which came from QR.
    """

    nfev: int
    nit: int
    cost: float
    accepted: bool
    ratio: float
    radius: float
    damping: float
    length: float
    polishing: bool
    escalated: bool


def iteration(state: LMState, polishing: bool) -> Iteration:
    """The entry for the trial that led to a state."""
    return Iteration(
        state.nfev,
        state.nit,
        state.cost,
        state.accepted,
        state.ratio,
        state.damping.radius,
        state.damping.mu,
        state.length,
        polishing,
        state.escalated,
    )


def is_polish(before: LMState, after: LMState) -> bool:
    """Whether the trial between two states was a polishing one; the test may fire on the way."""
    return bool(before.fired or after.polished > before.polished or after.doubts > before.doubts)


def settled_reach(before: Iteration, last: Iteration, error: float) -> float:
    """How far, relatively, a parameter may have gone in the last trial for the fit to be settled.

    ``error`` is that of the differences: what a further step would change is below it, at the rate
    of the last two. 0 where they say nothing.
    """
    if not (before.accepted and last.accepted) or last.damping or last.polishing:
        return 0.0
    if last.length > FAST * before.length:
        return 0.0
    return min(CLOSE, error * before.length / last.length) if last.length else CLOSE


HEADER = (
    f"{'Evaluation':>10} {'Iteration':>9} {'cost':>15} {'gain ratio':>11} {'radius':>10} "
    f"{'damping':>10}"
)


def line(i: Iteration) -> str:
    """An entry as it is printed, below HEADER."""
    mark = "" if i.accepted else "  rejected"
    mark += "  polish" if i.polishing else ""
    return (
        f"{i.nfev:>10} {i.nit:>9} {i.cost:>15.8e} {i.ratio:>11.3g} {i.radius:>10.2e} "
        f"{i.damping:>10.2e}{mark}"
    )
