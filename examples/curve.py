"""A ringing sensor, fitted through outliers: bounds, a robust loss, standard errors, a band.

    python examples/curve.py [--out out]

`curve_fit` as from SciPy, first by plain least squares, which the outliers pull away, then by a
robust loss, which they do not; and the same fit once more by `least_squares`. Draws the data, both
curves and the 95 % confidence band of the second.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import lmsolve

TRUE = np.array([2.0, 0.35, 3.0, 0.4, 1.0])
NOISE = 0.1  # standard deviation of a good measurement
BOUNDS = ([0, 0, 0, -np.pi, -np.inf], [np.inf, np.inf, 10, np.pi, np.inf])


def ringing(t, amplitude, decay, frequency, phase, offset):
    """An oscillation that dies away."""
    return amplitude * np.exp(-decay * t) * np.cos(frequency * t + phase) + offset


def slopes(t, amplitude, decay, frequency, phase, offset):
    """Its derivatives in the five parameters, (points, 5)."""
    envelope, angle = np.exp(-decay * t), frequency * t + phase
    cosine, sine = envelope * np.cos(angle), envelope * np.sin(angle)
    columns = [cosine, -t * amplitude * cosine, -t * amplitude * sine, -amplitude * sine]
    return np.stack([*columns, np.ones_like(t)], axis=1)


def measure():
    """120 points with noise, every tenth of them far too high."""
    rng = np.random.default_rng(1)
    t = np.linspace(0, 8, 120)
    y = ringing(t, *TRUE) + NOISE * rng.standard_normal(t.size)
    wrong = rng.choice(t.size, t.size // 10, replace=False)
    y[wrong] += rng.uniform(0.8, 2.5, wrong.size)
    return t, y


def half_width(t, x, covariance):
    """Half of the width of the 95 % band of the curve at t: its slopes carry the covariance."""
    J = slopes(t, *x)
    return 1.96 * np.sqrt(np.einsum("ti,ij,tj->t", J, covariance, J))


def draw(t, y, plain, robust, path):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    grid = np.linspace(t[0], t[-1], 400)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, layout="constrained", height_ratios=[3, 1.3]
    )
    top.plot(t, y, "o", ms=4, mfc="none", mec="0.4", label="measured, one in ten wrong")
    top.plot(grid, ringing(grid, *plain.x), "C1--", label="plain least squares")
    top.plot(grid, ringing(grid, *robust.x), "C0", label='robust, loss="soft_l1"')
    top.set(ylabel="signal")
    top.legend()

    def beside(curve):
        return curve - ringing(grid, *TRUE)

    half = half_width(grid, robust.x, robust.covariance())
    fitted = beside(ringing(grid, *robust.x))
    bottom.fill_between(grid, fitted - half, fitted + half, alpha=0.25, lw=0, label="95 % band")
    bottom.plot(grid, fitted, "C0")
    bottom.plot(grid, beside(ringing(grid, *plain.x)), "C1--")
    bottom.axhline(0, color="k", lw=0.8)
    bottom.set(xlabel="t", ylabel="curve - truth")
    bottom.legend(loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"\nwrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    t, y = measure()
    start = [1, 0.1, 2.8, 0, 0]
    common = {"p0": start, "bounds": BOUNDS, "jac": slopes}
    plain = lmsolve.curve_fit(ringing, t, y, **common).result

    fit = lmsolve.curve_fit(ringing, t, y, loss="soft_l1", f_scale=NOISE, **common)
    popt, _pcov = fit  # as from SciPy; .result has the rest
    robust = fit.result
    print(robust)

    def residual(x):
        return ringing(t, *x) - y

    again = lmsolve.least_squares(residual, start, bounds=BOUNDS, loss="soft_l1", f_scale=NOISE)
    assert np.allclose(again.x, popt, rtol=1e-6)  # with derivatives by differences

    away, away_plain = (abs(r.x - TRUE) / robust.standard_errors() for r in (robust, plain))
    print("\nFrom the true parameters, in standard errors of the robust fit:")
    print("  robust", np.round(away, 1), "\n  plain ", np.round(away_plain, 1))
    draw(t, y, plain, robust, args.out / "curve.png")
    assert away.max() < 3 < away_plain.max()
    error = ringing(t, *popt) - ringing(t, *TRUE)
    assert np.mean(abs(error) < half_width(t, popt, robust.covariance())) > 0.9


if __name__ == "__main__":
    main()
