"""Fit measured data from a start far off, print the report, draw the picture.

The data are NIST's Thurber set: electron mobility in a semiconductor against the logarithm of the
carrier density, 37 measurements, modelled by a ratio of two cubics with 7 parameters. NIST rates it
"higher level of difficulty" and certifies the answer to 11 digits, so the fit can be checked.

    python examples/demo.py                 # writes out/demo.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

import lmsolve

mpl.use("Agg")  # draws to a file, with or without a screen
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "nist" / "Thurber.dat"
PICTURE = ROOT / "out" / "demo.png"

START = np.array([1000, 1000, 400, 40, 0.7, 0.3, 0.03])  # NIST's start 1
CERTIFIED = np.array(
    [
        1.2881396800e3,
        1.4910792535e3,
        5.8323836877e2,
        7.5416644291e1,
        9.6629502864e-1,
        3.9797285797e-1,
        4.9727297349e-2,
    ]
)

INK, MUTED, BLUE, ORANGE, GRID = "#1f2430", "#6b7280", "#2463b0", "#e07b39", "#e5e7eb"


def mobility(x, b1, b2, b3, b4, b5, b6, b7):
    """Ratio of two cubics."""
    return (b1 + x * (b2 + x * (b3 + x * b4))) / (1 + x * (b5 + x * (b6 + x * b7)))


def draw(x, y, start, fitted, picture):
    """Data, start and fit above, residuals below."""
    grid = np.linspace(x.min() - 0.1, x.max() + 0.1, 500)
    residual = y - mobility(x, *fitted)
    sd = np.sqrt(residual @ residual / (x.size - fitted.size))
    plt.rcParams.update(
        {"font.size": 11, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK,
         "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False,
         "axes.spines.right": False}
    )  # fmt: skip
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 6.6), sharex=True, layout="constrained", height_ratios=[3.2, 1]
    )
    top.plot(grid, mobility(grid, *start), color=ORANGE, lw=1.8, ls=(0, (5, 3)))
    top.plot(grid, mobility(grid, *fitted), color=BLUE, lw=2.4)
    top.plot(x, y, "o", ms=6, mfc="white", mec=INK, mew=1.2, zorder=3)
    label = {"fontsize": 11.5, "ha": "left", "va": "center"}
    top.text(1.05, mobility(1.05, *start) - 75, "start", color=ORANGE, **label)
    top.text(0.62, mobility(0.62, *fitted) + 85, "fit", color=BLUE, **label, fontweight="bold")
    top.text(-3.08, y[x < -2.3].max() + 70, "37 measurements", color=INK, **label)
    top.set_ylabel("electron mobility")
    top.set_ylim(-40, 1620)
    top.set_title(
        "lmsolve on the NIST Thurber set: 7 parameters from a start far off",
        loc="left", fontsize=13.5, fontweight="bold", pad=14,
    )  # fmt: skip

    bottom.axhspan(-2 * sd, 2 * sd, color=BLUE, alpha=0.10, lw=0)
    bottom.axhline(0, color=BLUE, lw=1.4)
    bottom.vlines(x, 0, residual, color=MUTED, lw=1)
    bottom.plot(x, residual, "o", ms=5, mfc="white", mec=INK, mew=1.1)
    bottom.text(
        x.min() - 0.1, 2 * sd, f"  ±2 sd, sd = {sd:.4g}", color=BLUE, fontsize=9.5, va="bottom"
    )
    bottom.set_ylim(-3.3 * sd, 3.3 * sd)
    bottom.set_ylabel("data − fit")
    bottom.set_xlabel("log carrier density")
    bottom.set_xlim(grid[0] - 0.05, grid[-1] + 0.05)
    for axes in (top, bottom):
        axes.grid(color=GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=6)
    figure.align_ylabels()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


def main() -> int:
    y, x = np.loadtxt(DATA, skiprows=60, unpack=True)
    fit = lmsolve.curve_fit(mobility, x, y, p0=START)
    print(fit)

    parameters, _covariance = fit
    digits = -np.log10(np.max(np.abs(parameters / CERTIFIED - 1)))
    print(f"\nEvery parameter agrees with NIST's certified value to {digits:.1f} digits or more.")
    draw(x, y, START, parameters, PICTURE)
    print(f"The picture is in {PICTURE}")
    assert digits > 6
    return 0


if __name__ == "__main__":
    sys.exit(main())
