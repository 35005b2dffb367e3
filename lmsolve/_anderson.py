"""Anderson's mixing of Gauss-Newton steps, for the polish.

D. G. Anderson (1965), "Iterative procedures for nonlinear integral equations"; H. Walker, P. Ni
(2011), "Anderson acceleration for fixed-point iterations".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._state import LMState
from ._trust import Step, scaled_norm
from ._xp import Array, Namespace, to_floats

#: How many earlier steps each one is mixed with.
MEMORY = 5


def mixed(
    xp: Namespace, state: LMState, step: Step, D: Array
) -> tuple[Array, tuple[tuple[Array, Array], ...]]:
    """Anderson's mixture of the step with those before it (n,), and the new trail.

    With x_i and p_i the earlier points and steps, the weights minimise the scaled norm of
    ``p - sum(w_i (p - p_i))``; Walker and Ni (2011), eq. 2.3, with the newest point as the base.
    """
    trail = state.trail
    p = step.p
    new_trail = ((state.x, p), *trail)[:MEMORY]
    if not trail:
        return p, new_trail
    dP = [(p - p_i) for _, p_i in trail]
    columns = xp.stack([column * D for column in dP], axis=1)
    weights = _least_squares_weights(columns, p * D, xp)
    mixed = p
    for w, (x_i, _), dp in zip(weights, trail, dP, strict=True):
        mixed = mixed - w * ((state.x - x_i) + dp)
    far = not scaled_norm(xp, mixed, D) <= 10.0 * step.length
    return (p if far else mixed), new_trail


def _least_squares_weights(A: Array, b: Array, xp: Namespace) -> Sequence[float]:
    """Host weights (k,) that minimise ``|A w - b|``, k <= MEMORY, small directions left out."""
    gram = xp.matmul(A.T, xp.concat([A, b[:, None]], axis=1))
    k = A.shape[1]
    flat = to_floats(*[gram[i, j] for i in range(k) for j in range(k + 1)])
    M = np.array(flat).reshape(k, k + 1)
    scale = np.sqrt(np.diagonal(M[:, :k]))
    scale = np.where(scale > 0, scale, 1.0)
    w = np.linalg.lstsq(M[:, :k] / np.outer(scale, scale), M[:, k] / scale, rcond=1e-13)[0]
    return [float(v) for v in w / scale]
