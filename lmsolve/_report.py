"""The printed report of a fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._xp import to_numpy

#: Parameters and correlations listed at most.
PARAMETERS, CORRELATIONS = 40, 12


def report(result: Any, threshold: float) -> str:
    """Report of a LeastSquaresResult; correlations from ``threshold`` on are listed."""
    context = result._known()
    x = to_numpy(result.x)
    names = context.names or [f"x[{j}]" for j in range(x.shape[0])]
    lines = [
        f"Least squares: {'converged' if result.success else 'not converged'}. {result.message}",
        f"  {context.m} residuals, {x.shape[0]} parameters; {result.nfev} evaluations, "
        f"{result.njev} Jacobians, {result.nit} steps",
    ]
    if np.iscomplexobj(x):
        return "\n".join([*lines, f"  cost {result.cost:.8g}", *_values(names, x)])
    try:
        u = result.uncertainty()
    except (ValueError, np.linalg.LinAlgError) as error:
        return "\n".join([*lines, f"  cost {result.cost:.8g}; no standard errors: {error}"])
    chi = 2.0 * result.cost / u.dof if u.dof > 0 else math.nan
    lines.append(
        f"  cost {result.cost:.8g}, reduced chi-square {chi:.6g} on {u.dof} degrees of freedom"
    )
    lines += ["", *_table(names, x, u, to_numpy(result.active_mask), context)]
    if u.null_space.shape[1]:
        lines.append(
            f"  The data leave {u.null_space.shape[1]} direction(s) undetermined: "
            f"rank {u.rank} for {int((~u.held).sum())} free parameters."
        )
    return "\n".join([*lines, *_correlations(names, u.correlation, threshold)])


def _values(names: Any, x: np.ndarray) -> list[str]:
    """Plain lines of names and values."""
    return [f"  {name} = {value:.8g}" for name, value in list(zip(names, x))[:PARAMETERS]]


def _table(names: Any, x: np.ndarray, u: Any, active: np.ndarray, context: Any) -> list[str]:
    """Parameters with standard errors, one line each."""
    shown = min(len(x), PARAMETERS)
    width = max(9, *(len(str(n)) for n in names[:shown]))
    rows = [f"  {'parameter':<{width}} {'value':>16} {'std. error':>14} {'relative':>10}"]
    for j in range(shown):
        stderr = float(u.stderr[j])
        if u.held[j]:
            at_bound = active[j] and context.lb[j] < context.ub[j]
            note = (
                ("at lower bound" if active[j] < 0 else "at upper bound") if at_bound else "fixed"
            )
            rows.append(f"  {names[j]:<{width}} {x[j]:>16.9g} {note:>14}")
            continue
        relative = f"{100 * stderr / abs(x[j]):.3g} %" if x[j] and math.isfinite(stderr) else ""
        rows.append(f"  {names[j]:<{width}} {x[j]:>16.9g} {stderr:>14.6g} {relative:>10}".rstrip())
    if shown < len(x):
        rows.append(f"  ... and {len(x) - shown} more")
    return rows


def _correlations(names: Any, correlation: np.ndarray, threshold: float) -> list[str]:
    """The largest correlations, one line each."""
    i, j = np.triu_indices(correlation.shape[0], k=1)
    c = correlation[i, j]
    large = np.flatnonzero(np.abs(c) >= threshold)
    if not large.size:
        return []
    order = large[np.argsort(-np.abs(c[large]), kind="stable")]
    lines = ["", f"  correlations of at least {threshold:g}"]
    lines += [f"  {names[i[k]]}, {names[j[k]]}: {c[k]:+.4f}" for k in order[:CORRELATIONS]]
    if order.size > CORRELATIONS:
        lines.append(f"  ... and {order.size - CORRELATIONS} more")
    return lines
