"""Why a run ended: the codes of `status`, and what is said of each."""

from __future__ import annotations

from ._state import LMState

CALLBACK, MAX_NFEV, GTOL, FTOL, XTOL, BOTH = -2, 0, 1, 2, 3, 4
NOT_FINITE, SINGULAR, STUCK = -3, -4, -5
#: Why a run ended, by status.
MESSAGES: dict[int | None, str] = {
    CALLBACK: "The callback asked to stop.",
    MAX_NFEV: "`max_nfev` reached: {nfev} evaluations.",
    GTOL: "`gtol` reached: {value:.1e} <= {limit:.1e}.",
    FTOL: "`ftol` reached: {value:.1e} <= {limit:.1e}.",
    XTOL: "`xtol` reached: {value:.1e} <= {limit:.1e}.",
    BOTH: "`ftol` and `xtol` reached: {value:.1e} <= {limit:.1e}.",
    NOT_FINITE: "The Jacobian is not finite at the best point found.",
    STUCK: "No step from the best point, however small, has a finite cost below it.",
    SINGULAR: "The damped system stayed singular up to a damping of {damping:.1e}.",
    None: "Still running.",
}


def message(state: LMState) -> str:
    """Why a run ended, with the figures that decided it."""
    return MESSAGES[state.status].format(
        nfev=state.nfev, value=state.value, limit=state.limit, damping=state.damping.mu
    )
