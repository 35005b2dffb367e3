"""The 27 nonlinear sets of the NIST Statistical Reference Datasets, as least-squares problems.

Data, starting points and certified values are read from ``tests/data/nist/*.dat``; models and exact
Jacobians are written here, from the formulas in those files. Overflow gives inf or nan in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

FOLDER = Path(__file__).parent / "data" / "nist"
NAMES = (  # NIST's order: lower, average, higher level of difficulty
    "Misra1a", "Chwirut2", "Chwirut1", "Lanczos3", "Gauss1", "Gauss2", "DanWood", "Misra1b",
    "Kirby2", "Hahn1", "Nelson", "MGH17", "Lanczos1", "Lanczos2", "Gauss3", "Misra1c", "Misra1d",
    "Roszman1", "ENSO",
    "MGH09", "Thurber", "BoxBOD", "Rat42", "MGH10", "Eckerle4", "Rat43", "Bennett5",
)  # fmt: skip
CASES = [(name, start) for name in NAMES for start in (0, 1)]
DIGITS = 11  # certified


@dataclass(frozen=True, eq=False)
class NistProblem:
    """One set: data, starts (2, n), certified values (n,), and the model with its Jacobian.

    For Nelson, `x` is (2, m), one predictor a row, and `y` is the logarithm of the response.
    """

    name: str
    level: str
    x: Array
    y: Array
    starts: Array
    certified: Array
    certified_stderr: Array
    residual_ss: float
    residual_sd: float
    dof: int
    model: Callable[..., Array]
    columns: Callable[..., tuple[Array, ...]]

    @property
    def m(self) -> int:
        return self.y.shape[0]

    @property
    def n(self) -> int:
        return self.certified.shape[0]

    def fun(self, b: Array) -> Array:
        """Residual, model - y, shape (m,)."""
        with np.errstate(all="ignore"):
            return self.model(self.x, *b) - self.y

    @np.errstate(all="ignore")
    def jac(self, b: Array) -> Array:
        """Exact Jacobian of the residual, shape (m, n)."""
        return np.stack(np.broadcast_arrays(*self.columns(self.x, *b), self.y)[:-1], axis=1)

    def model_jac(self, x: Array, *b: float) -> Array:
        """Exact Jacobian of the model, shape (m, n), with curve_fit's signature for `jac`."""
        return self.jac(np.asarray(b))


def digits(x: Array, certified: Array) -> float:
    """Smallest log relative error over the parameters, 0 to 11 (0 for anything not finite)."""
    x = np.asarray(x, dtype=float)
    if not np.all(np.isfinite(x)):
        return 0.0
    relative = float(np.max(np.abs(x - certified) / np.abs(certified)))
    return float(np.clip(-np.log10(max(relative, 10.0**-DIGITS)), 0.0, DIGITS))


@cache
def load(name: str) -> NistProblem:
    """Read one set, with its model."""
    text = (FOLDER / f"{name}.dat").read_text()
    head, table = re.split(
        r"^Data:.*x.*$", text.split("Number of Observations:")[1], flags=re.MULTILINE
    )
    observations = int(head.split()[0])
    data = np.array([line.split() for line in table.split("\n") if line.strip()], dtype=float).T
    assert data.shape[1] == observations
    rows = np.array(re.findall(r"^ *b\d+ =(.*)$", text, flags=re.MULTILINE))
    starts_and_certified = np.array([row.split() for row in rows], dtype=float)
    start_1, start_2, certified, stderr = starts_and_certified.T
    y, x = data[0], data[1] if data.shape[0] == 2 else data[1:]
    model, columns = MODELS[name]
    level = re.search(r"(Lower|Average|Higher) Level", text)
    assert level is not None
    return NistProblem(
        name=name,
        level=level[1],
        x=x,
        y=np.log(y) if name == "Nelson" else y,
        starts=np.stack([start_1, start_2]),
        certified=certified,
        certified_stderr=stderr,
        residual_ss=_number("Residual Sum of Squares", text),
        residual_sd=_number("Residual Standard Deviation", text),
        dof=int(_number("Degrees of Freedom", text)),
        model=model,
        columns=columns,
    )


def _number(label: str, text: str) -> float:
    match = re.search(rf"^{label}: +(\S+)", text, flags=re.MULTILINE)
    assert match is not None
    return float(match[1])


# The models and, below each, the columns of its Jacobian. Products are ordered so that a column
# stays finite where the model does (a sigmoid's derivative rather than inf / inf).
quiet = np.errstate(all="ignore")


@quiet
def misra1a(x, b1, b2):
    return -b1 * np.expm1(-b2 * x)


def misra1a_jac(x, b1, b2):
    return -np.expm1(-b2 * x), b1 * x * np.exp(-b2 * x)


@quiet
def misra1b(x, b1, b2):
    return b1 * (1 - (1 + b2 * x / 2) ** -2)


def misra1b_jac(x, b1, b2):
    base = 1 + b2 * x / 2
    return 1 - base**-2, b1 * x * base**-3


@quiet
def misra1c(x, b1, b2):
    return b1 * (1 - (1 + 2 * b2 * x) ** -0.5)


def misra1c_jac(x, b1, b2):
    base = 1 + 2 * b2 * x
    return 1 - base**-0.5, b1 * x * base**-1.5


@quiet
def misra1d(x, b1, b2):
    return b1 * b2 * x / (1 + b2 * x)


def misra1d_jac(x, b1, b2):
    base = 1 + b2 * x
    return b2 * x / base, b1 * x / base**2


@quiet
def chwirut(x, b1, b2, b3):
    return np.exp(-b1 * x) / (b2 + b3 * x)


def chwirut_jac(x, b1, b2, b3):
    y = chwirut(x, b1, b2, b3)
    base = b2 + b3 * x
    return -x * y, -y / base, -x * y / base


@quiet
def lanczos(x, b1, b2, b3, b4, b5, b6):
    return b1 * np.exp(-b2 * x) + b3 * np.exp(-b4 * x) + b5 * np.exp(-b6 * x)


def lanczos_jac(x, b1, b2, b3, b4, b5, b6):
    e2, e4, e6 = np.exp(-b2 * x), np.exp(-b4 * x), np.exp(-b6 * x)
    return e2, -b1 * x * e2, e4, -b3 * x * e4, e6, -b5 * x * e6


@quiet
def gauss(x, b1, b2, b3, b4, b5, b6, b7, b8):
    decay = b1 * np.exp(-b2 * x)
    return decay + b3 * np.exp(-(((x - b4) / b5) ** 2)) + b6 * np.exp(-(((x - b7) / b8) ** 2))


def gauss_jac(x, b1, b2, b3, b4, b5, b6, b7, b8):
    decay = np.exp(-b2 * x)
    return decay, -b1 * x * decay, *_peak_columns(x, b3, b4, b5), *_peak_columns(x, b6, b7, b8)


def _peak_columns(x, height, centre, width):
    z = (x - centre) / width
    peak = np.exp(-(z**2))
    slope = 2 * height * z * peak / width
    return peak, slope, z * slope


@quiet
def danwood(x, b1, b2):
    return b1 * x**b2


def danwood_jac(x, b1, b2):
    power = x**b2
    return power, b1 * power * np.log(x)


@quiet
def kirby2(x, b1, b2, b3, b4, b5):
    return (b1 + x * (b2 + x * b3)) / (1 + x * (b4 + x * b5))


def kirby2_jac(x, b1, b2, b3, b4, b5):
    bottom = 1 + x * (b4 + x * b5)
    y = (b1 + x * (b2 + x * b3)) / bottom
    return 1 / bottom, x / bottom, x**2 / bottom, -x * y / bottom, -(x**2) * y / bottom


@quiet
def cubic_ratio(x, b1, b2, b3, b4, b5, b6, b7):
    return (b1 + x * (b2 + x * (b3 + x * b4))) / (1 + x * (b5 + x * (b6 + x * b7)))


def cubic_ratio_jac(x, b1, b2, b3, b4, b5, b6, b7):
    bottom = 1 + x * (b5 + x * (b6 + x * b7))
    top = tuple(x**k / bottom for k in range(4))
    y = cubic_ratio(x, b1, b2, b3, b4, b5, b6, b7)
    return *top, -y * top[1], -y * top[2], -y * top[3]


@quiet
def nelson(x, b1, b2, b3):
    return b1 - b2 * x[0] * np.exp(-b3 * x[1])


def nelson_jac(x, b1, b2, b3):
    decay = x[0] * np.exp(-b3 * x[1])
    return np.ones_like(decay), -decay, b2 * decay * x[1]


@quiet
def mgh17(x, b1, b2, b3, b4, b5):
    return b1 + b2 * np.exp(-b4 * x) + b3 * np.exp(-b5 * x)


def mgh17_jac(x, b1, b2, b3, b4, b5):
    e4, e5 = np.exp(-b4 * x), np.exp(-b5 * x)
    return np.ones_like(e4), e4, e5, -b2 * x * e4, -b3 * x * e5


@quiet
def roszman1(x, b1, b2, b3, b4):
    return b1 - b2 * x - np.arctan(b3 / (x - b4)) / np.pi


def roszman1_jac(x, b1, b2, b3, b4):
    shifted = x - b4
    bottom = np.pi * (shifted**2 + b3**2)
    return np.ones_like(bottom), -x * np.ones_like(bottom), -shifted / bottom, -b3 / bottom


@quiet
def enso(x, b1, b2, b3, b4, b5, b6, b7, b8, b9):
    year, first, second = 2 * np.pi * x / 12, 2 * np.pi * x / b4, 2 * np.pi * x / b7
    return (
        b1
        + (b2 * np.cos(year) + b3 * np.sin(year))
        + (b5 * np.cos(first) + b6 * np.sin(first))
        + (b8 * np.cos(second) + b9 * np.sin(second))
    )


def enso_jac(x, b1, b2, b3, b4, b5, b6, b7, b8, b9):
    year = 2 * np.pi * x / 12
    first, second = _cycle_columns(x, b4, b5, b6), _cycle_columns(x, b7, b8, b9)
    return np.ones_like(first[0]), np.cos(year), np.sin(year), *first, *second


def _cycle_columns(x, period, cosine, sine):
    phase = 2 * np.pi * x / period
    c, s = np.cos(phase), np.sin(phase)
    return (cosine * s - sine * c) * phase / period, c, s


@quiet
def mgh09(x, b1, b2, b3, b4):
    return b1 * (x**2 + x * b2) / (x**2 + x * b3 + b4)


def mgh09_jac(x, b1, b2, b3, b4):
    top, bottom = x**2 + x * b2, x**2 + x * b3 + b4
    y = b1 * top / bottom
    return top / bottom, b1 * x / bottom, -x * y / bottom, -y / bottom


@quiet
def boxbod(x, b1, b2):
    return -b1 * np.expm1(-b2 * x)


boxbod_jac = misra1a_jac


@quiet
def rat42(x, b1, b2, b3):
    return b1 / (1 + np.exp(b2 - b3 * x))


def rat42_jac(x, b1, b2, b3):
    u = b2 - b3 * x
    low, high = 1 / (1 + np.exp(u)), 1 / (1 + np.exp(-u))
    return low, -b1 * low * high, b1 * x * low * high


@quiet
def mgh10(x, b1, b2, b3):
    return b1 * np.exp(b2 / (x + b3))


def mgh10_jac(x, b1, b2, b3):
    shifted = x + b3
    growth = np.exp(b2 / shifted)
    return growth, b1 * growth / shifted, -b1 * growth * b2 / shifted**2


@quiet
def eckerle4(x, b1, b2, b3):
    return (b1 / b2) * np.exp(-0.5 * ((x - b3) / b2) ** 2)


def eckerle4_jac(x, b1, b2, b3):
    z = (x - b3) / b2
    peak = np.exp(-0.5 * z**2) / b2
    return peak, b1 * peak * (z**2 - 1) / b2, b1 * peak * z / b2


@quiet
def rat43(x, b1, b2, b3, b4):
    return b1 / (1 + np.exp(b2 - b3 * x)) ** (1 / b4)


def rat43_jac(x, b1, b2, b3, b4):
    u = b2 - b3 * x
    base = 1 + np.exp(u)
    fall = base ** (-1 / b4)
    slope = b1 * fall / (1 + np.exp(-u)) / b4
    return fall, -slope, x * slope, b1 * fall * np.log(base) / b4**2


@quiet
def bennett5(x, b1, b2, b3):
    return b1 * (b2 + x) ** (-1 / b3)


def bennett5_jac(x, b1, b2, b3):
    base = b2 + x
    power = base ** (-1 / b3)
    return power, -b1 * power / base / b3, b1 * power * np.log(base) / b3**2


MODELS: dict[str, tuple[Callable[..., Array], Callable[..., tuple[Array, ...]]]] = {
    "Misra1a": (misra1a, misra1a_jac),
    "Misra1b": (misra1b, misra1b_jac),
    "Misra1c": (misra1c, misra1c_jac),
    "Misra1d": (misra1d, misra1d_jac),
    "Chwirut1": (chwirut, chwirut_jac),
    "Chwirut2": (chwirut, chwirut_jac),
    "Lanczos1": (lanczos, lanczos_jac),
    "Lanczos2": (lanczos, lanczos_jac),
    "Lanczos3": (lanczos, lanczos_jac),
    "Gauss1": (gauss, gauss_jac),
    "Gauss2": (gauss, gauss_jac),
    "Gauss3": (gauss, gauss_jac),
    "DanWood": (danwood, danwood_jac),
    "Kirby2": (kirby2, kirby2_jac),
    "Hahn1": (cubic_ratio, cubic_ratio_jac),
    "Thurber": (cubic_ratio, cubic_ratio_jac),
    "Nelson": (nelson, nelson_jac),
    "MGH17": (mgh17, mgh17_jac),
    "Roszman1": (roszman1, roszman1_jac),
    "ENSO": (enso, enso_jac),
    "MGH09": (mgh09, mgh09_jac),
    "BoxBOD": (boxbod, boxbod_jac),
    "Rat42": (rat42, rat42_jac),
    "MGH10": (mgh10, mgh10_jac),
    "Eckerle4": (eckerle4, eckerle4_jac),
    "Rat43": (rat43, rat43_jac),
    "Bennett5": (bennett5, bennett5_jac),
}
