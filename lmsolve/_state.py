"""The state of a run: what must be kept to go on, and how it is saved.

Everything but ``residual`` and ``subproblem`` is saved; these two follow from x, and `resume`
evaluates them anew. A resumed run takes the same steps, to the last bit, as one never interrupted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ._damping import Damping
from ._xp import Array


class LMState(NamedTuple):
    """State of a Levenberg-Marquardt run after a trial; immutable.

    Attributes
    ----------
    x : array, shape (n,)
        Best parameters so far.
    cost : float
        Cost at ``x``.
    scale : array, shape (n,), or None
        Running maximum of the column norms of the Jacobian.
    damping : Damping
        Trust radius and damping.
    nfev, njev, nit : int
        Residual evaluations, Jacobians and accepted steps.
    accepted : bool
        Whether the last trial was accepted.
    ratio, length : float
        Gain ratio and scaled length of the last trial step.
    fired : int
        Status of the convergence test that fired on the last trial, 0 for none.
    value, limit : float
        The figure of that test and its tolerance.
    polished, doubts : int
        Polishing steps taken since, and times that polishing found the run not converged.
    escalated : bool
        Whether the last step came from a QR factorisation.
    central : bool
        Whether differences have gone over to the central formula.
    trail : tuple of (array, array)
        The latest polishing points and steps, newest first.
    status : int or None
        Why the run ended, None while it goes on.
    point : object
        Residuals and linearisation at ``x``; never saved.
    """

    x: Array
    cost: float
    scale: Array | None
    damping: Damping
    nfev: int = 1
    njev: int = 0
    nit: int = 0
    accepted: bool = True
    ratio: float = 1.0
    length: float = float("inf")
    fired: int = 0
    value: float = 0.0
    limit: float = 0.0
    polished: int = 0
    doubts: int = 0
    escalated: bool = False
    central: bool = False
    trail: tuple[tuple[Array, Array], ...] = ()
    status: int | None = None
    point: Any = None
