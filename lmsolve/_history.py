"""The history of a run: one entry for each trial, and how it is printed."""

from __future__ import annotations

from typing import NamedTuple

from ._state import LMState


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
        Whether the step came from a QR factorisation, the normal equations being ill-conditioned.
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


HEADER = (
    f"{'Evaluation':>10} {'Iteration':>9} {'cost':>15} {'gain ratio':>11} {'radius':>10} "
    f"{'damping':>10}"
)


def line(i: Iteration) -> str:
    mark = "" if i.accepted else "  rejected"
    mark += "  polish" if i.polishing else ""
    return (
        f"{i.nfev:>10} {i.nit:>9} {i.cost:>15.8e} {i.ratio:>11.3g} {i.radius:>10.2e} "
        f"{i.damping:>10.2e}{mark}"
    )
