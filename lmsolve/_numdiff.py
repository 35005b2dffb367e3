"""Finite-difference Jacobians, dense and grouped, never evaluated outside the bounds.

The step of parameter j is ``h_j = eps**(1/s) * size_j`` with s = 2 for one-sided differences and
s = 3 for central ones, where ``size_j = max(|x_j|, FLOOR * typical_j)``: relative to the parameter
itself, so that one of 1e-7 is differentiated as well as one of 1e7, and with a floor that keeps a
parameter on its way through zero from being differentiated by rounding errors. The size of a
parameter says nothing where only a small change of it matters (a frequency of 6 GHz, known to 10
Hz): a central difference that finds its own two halves unequal is taken again with a step that
suits the curvature.

References: Curtis, Powell, Reid (1974), "On the estimation of sparse Jacobian matrices"
(grouped columns); Squire and Trapp (1998), "Using complex variables to estimate derivatives of
real functions" (the complex step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._xp import FLOAT, Array, array_namespace, is_cupynumeric, sum_squares, to_floats

#: A parameter that is smaller than this share of its typical size is stepped by that share.
FLOOR = 1e-3
#: A central difference is taken again with a shorter step if its halves differ by more than this.
CURVED = 1e-3

Evaluate = Callable[[Array], Array]
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass
class Differences:
    """How to difference: ``kind`` is '2-point', '3-point' or 'cs'.

    typical (n,) holds the sizes assumed for parameters at zero, ``precision`` the relative error of
    the residuals, lb and ub (n,) the bounds, held (n,) flags parameters whose columns are zero, all
    host arrays; ``rel_step`` overrides the relative step.
    """

    kind: str
    typical: np.ndarray
    precision: float = 2.0**-52
    lb: np.ndarray | None = None
    ub: np.ndarray | None = None
    held: np.ndarray | None = None
    rel_step: np.ndarray | float | None = None
    map: Map = map

    def steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Signed steps (n,) and a mask (n,) of columns that must be one-sided at a bound."""
        one_sided = np.zeros(x.shape, dtype=bool)
        if self.kind == "cs":  # any tiny step is exact: nothing is subtracted
            return np.full(x.shape, 1e-20, dtype=x.dtype), one_sided
        power = 0.5 if self.kind == "2-point" else 1.0 / 3.0
        size = np.maximum(np.abs(x), FLOOR * self.typical)
        if self.rel_step is None:
            h = self.precision**power * size
        else:
            h = self.rel_step * np.where(x == 0, self.typical, np.abs(x))
        if self.kind == "2-point":
            h = np.copysign(h, x)
        # What is representable: (x + h) - x is the step that is really taken.
        h = (x + h) - x
        if not h.all():
            h = np.where(h == 0, np.spacing(np.abs(x) + np.finfo(x.dtype).tiny), h)
        if self.lb is None or self.ub is None:
            return h, one_sided
        return self._inside(x, h)

    def shorter(self, x_j: float, typical: float, h: float, bend: float) -> float:
        """A step for the scale h / bend on which the residuals turn out to be curved, or 0.

        It balances rounding, ``precision |x_j| / h``, with truncation, ``(h bend / h0)**2``; on a
        scale of the parameter's own size it would be the usual step.
        """
        if not bend > CURVED or self.rel_step is not None:
            return 0.0
        size = max(abs(x_j), FLOOR * typical)
        scale = max(abs(h) / bend, self.precision**0.5 * size)
        step = min((self.precision * size * scale**2) ** (1.0 / 3.0), 0.1 * abs(h))
        return float((x_j + step) - x_j)

    def is_plain(self) -> bool:
        """Whether `plain_steps` serves: one-sided, in float64, nothing bounded, held or mapped."""
        return (
            self.kind == "2-point"
            and self.lb is None
            and self.held is None
            and self.rel_step is None
            and self.map is map
            and self.precision == 2.0**-52
        )

    def shortest(self) -> list[float]:
        """The shortest of the steps that `plain_steps` takes."""
        return [2.0**-26 * FLOOR * typical for typical in self.typical.tolist()]

    def _inside(self, x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Steps (n,) turned round, shortened or made one-sided so that they stay in bounds."""
        assert self.lb is not None and self.ub is not None
        below, above = _room(x, self.lb), _room(x, self.ub)
        room = np.maximum(below, above)
        size = np.minimum(np.abs(h), room)
        fits = np.where(h >= 0, above, below) >= size
        sign = np.where(fits, np.sign(h), np.where(above >= below, 1.0, -1.0))
        one_sided = np.minimum(below, above) < size
        if self.kind == "3-point":  # a second-order one-sided formula reaches out to 2 h
            sign = np.where(one_sided, np.where(above >= below, 1.0, -1.0), sign)
            size = np.where(one_sided, np.minimum(size, 0.5 * room), size)
        return sign * size, one_sided

    def free(self, n: int) -> list[int]:
        """Indices of the columns to difference."""
        if self.held is None:
            return list(range(n))
        return [j for j in range(n) if not self.held[j]]


def plain_steps(x: np.ndarray, shortest: list[float]) -> list[float]:
    """`Differences.steps` in Python floats: half a microsecond where NumPy takes ten."""
    steps = []
    for value, least in zip(x.tolist(), shortest):
        h = 2.0**-26 * value
        if -least < h < least:
            h = math.copysign(least, value)
        steps.append((value + h) - value or math.ulp(value))
    return steps


def _room(x: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """How far x (n,) can move towards a bound (n,) so that no rounding takes it beyond."""
    epsilon = np.finfo(x.dtype).eps
    reach = np.where(np.isfinite(bound), np.maximum(np.abs(x), np.abs(bound)), 0.0)
    return np.asarray(np.maximum(np.abs(x - bound) - epsilon * reach, 0.0))


def dense(
    diff: Differences, evaluate: Evaluate, x: np.ndarray, r: np.ndarray, out: np.ndarray | None
) -> np.ndarray:
    """Jacobian (m, n), Fortran-ordered, each column written in place into ``out`` if given."""
    m, n = r.shape[0], x.shape[0]
    J = np.empty((m, n), dtype=r.dtype, order="F") if out is None else out
    if diff.is_plain():
        return _forward(evaluate, x, r, plain_steps(x, diff.shortest()), range(n), J)
    h, one_sided = diff.steps(x)
    columns = [j for j in diff.free(n) if h[j] != 0]  # bounds may leave no room at all
    if len(columns) < n:
        J[...] = 0
    if diff.map is map and diff.kind == "2-point":
        return _forward(evaluate, x, r, h.tolist(), columns, J)
    points = (x_ for j in columns for x_ in _points(diff.kind, x, j, h[j], bool(one_sided[j])))
    values = iter(diff.map(evaluate, points if diff.map is map else list(points)))
    for j in columns:
        bend = _combine(diff.kind, values, r, x[j], h[j], bool(one_sided[j]), J[:, j])
        step = diff.shorter(x[j], diff.typical[j], h[j], bend)
        if step:
            again = iter(diff.map(evaluate, list(_points(diff.kind, x, j, step, False))))
            column = np.empty_like(r)
            # Where the halves differ by noise, a shorter step makes them differ more.
            if _combine(diff.kind, again, r, x[j], step, False, column) < bend:
                J[:, j] = column
    return J


def _forward(
    evaluate: Evaluate,
    x: np.ndarray,
    r: np.ndarray,
    steps: list[float],
    columns: Iterable[int],
    J: np.ndarray,
) -> np.ndarray:
    """One-sided differences into J (m, n), column by column: no copy but J itself."""
    point, origin = x.copy(), x.tolist()
    for j in columns:
        point[j] = origin[j] + steps[j]
        column = J[:, j]
        np.subtract(evaluate(point), r, out=column)
        _divide(column, steps[j])
        point[j] = origin[j]
    return J


def _divide(column: np.ndarray, h: float) -> None:
    """``column / h`` in place, as a product: divisions take longer than the subtraction before."""
    inverse = 1.0 / h
    if column.dtype is FLOAT and abs(inverse) < math.inf:
        column *= inverse
    else:
        column /= h


def _points(kind: str, x: np.ndarray, j: int, h: float, one_sided: bool) -> Iterator[np.ndarray]:
    """The points at which column j is evaluated."""
    if kind == "cs":
        p = x.astype(np.result_type(x.dtype, np.complex64))
        p[j] += 1j * h
        yield p
        return
    offsets = (h,) if kind == "2-point" else ((h, 2 * h) if one_sided else (-h, h))
    for offset in offsets:
        p = x.copy()
        p[j] += offset
        yield p


def _combine(
    kind: str,
    values: Iterator[np.ndarray],
    r: np.ndarray,
    x_j: float,
    h: float,
    one_sided: bool,
    out: np.ndarray,
) -> float:
    """The difference formula, written into ``out`` (m,); how unequal the halves of a central one.

    A value is used up before the next one is asked for: the user may fill one array at every call.
    """
    if kind == "cs":
        np.divide(next(values).imag, h, out=out)
    elif kind == "2-point":
        np.subtract(next(values), r, out=out)
        _divide(out, (x_j + h) - x_j)
    elif one_sided:
        near = next(values) - r
        np.subtract(4.0 * near, next(values) - r, out=out)
        out /= 2.0 * h
    else:
        np.copyto(out, next(values))
        right = next(values)
        bend = out + right
        bend -= 2.0 * r
        np.subtract(right, out, out=out)
        slope, bent = float(sum_squares(np, out)), float(sum_squares(np, bend))
        out /= (x_j + h) - (x_j - h)
        return _bend(bent, slope)
    return 0.0


def dense_xp(
    diff: Differences,
    evaluate: Evaluate,
    x: Array,
    x_host: np.ndarray,
    r: Array,
    squares: Callable[[Array], Array],
) -> Array:
    """Jacobian (m, n) in a namespace that may lack item assignment: one unit step per column.

    ``squares`` sums the squares of an array of the namespace of r, up to a common factor.
    """
    n = x.shape[0]
    h, one_sided = diff.steps(x_host)
    index = array_namespace(x).arange(n, device=_device(x))
    columns = _Placed(r, n) if is_cupynumeric(r) else _Stack(r, n)
    central = []
    sums: list[Array] = []
    for j in diff.free(n):
        if h[j] == 0:
            continue
        s, unit = float(h[j]), _unit_vector(index, j, x)
        if diff.kind == "cs":
            columns[j] = array_namespace(r).imag(evaluate(x + 1j * s * unit)) / s
        elif diff.kind == "2-point":
            columns[j] = (evaluate(x + s * unit) - r) / s
        elif one_sided[j]:
            near = evaluate(x + s * unit) - r
            columns[j] = (4 * near - (evaluate(x + 2 * s * unit) - r)) / (2 * s)
        else:
            columns[j], halves = _central_xp(squares, evaluate, x, r, s, unit)
            central.append(j)
            sums.extend(halves)
    found = to_floats(*sums) if sums else []
    for k, j in enumerate(central):
        bend = _bend(*found[2 * k : 2 * k + 2])
        s = diff.shorter(x_host[j], diff.typical[j], h[j], bend)
        if s:
            unit = _unit_vector(index, j, x)
            column, again = _central_xp(squares, evaluate, x, r, s, unit)
            if _bend(*to_floats(*again)) < bend:
                columns[j] = column
    return columns.matrix()


def _unit_vector(index: Array, j: int, x: Array) -> Array:
    """A unit vector (n,) of the dtype of x, from the numbers of its entries."""
    return array_namespace(x).astype(index == j, x.dtype)


class _Stack:
    """Columns (m,) of a matrix (m, n), zeros where none is given, put together at the end."""

    def __init__(self, r: Array, n: int) -> None:
        self._columns = [array_namespace(r).zeros_like(r)] * n

    def __setitem__(self, j: int, column: Array) -> None:
        self._columns[j] = column

    def matrix(self) -> Array:
        """The matrix (m, n)."""
        return array_namespace(self._columns[0]).stack(self._columns, axis=1)


class _Placed:
    """The same, each written to its place, which takes half the memory."""

    def __init__(self, r: Array, n: int) -> None:
        m, zeros = r.shape[0], array_namespace(r).zeros
        # Of a wide matrix the columns are what Legate cuts: they lie together.
        self._matrix = zeros((m, n), dtype=r.dtype) if m >= n else zeros((n, m), dtype=r.dtype).T

    def __setitem__(self, j: int, column: Array) -> None:
        self._matrix[:, j] = column

    def matrix(self) -> Array:
        """The matrix (m, n)."""
        return self._matrix


def _central_xp(
    squares: Callable[[Array], Array],
    evaluate: Evaluate,
    x: Array,
    r: Array,
    s: float,
    unit: Array,
) -> tuple[Array, tuple[Array, Array]]:
    """A central difference (m,) with step s; 0-d squares of the halves' sum and difference."""
    left = evaluate(x - s * unit) - r
    right = evaluate(x + s * unit) - r
    return (right - left) / (2 * s), (squares(left + right), squares(right - left))


def _bend(bent: float, slope: float) -> float:
    """How unequal the halves of a central difference are, from sums of squares.

    Infinitely where one of them is not finite: the step has left the domain of the function.
    """
    if not math.isfinite(bent + slope):
        return math.inf
    return math.sqrt(bent / slope) if slope > 0.0 else 0.0


def _device(a: Array) -> Any:
    import array_api_compat

    return array_api_compat.device(a)


@dataclass(frozen=True)
class Sparsity:
    """Structure (m, n) of a sparse Jacobian, its columns grouped so that no row repeats.

    indptr and indices are those of the CSR matrix; ``groups`` holds for each group its mask of
    columns (n,), and the places of its entries in the CSR data with their rows and columns.
    """

    indptr: np.ndarray
    indices: np.ndarray
    groups: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
    shape: tuple[int, int]


def sparsity(structure: Any) -> Sparsity:
    """Group the columns of a structure (m, n), dense or sparse, by SciPy's greedy colouring."""
    from scipy.optimize._numdiff import group_columns
    from scipy.sparse import csr_array, issparse

    pattern = csr_array(structure if issparse(structure) else np.atleast_2d(structure))
    pattern.sum_duplicates()
    columns = pattern.tocsc()
    # The fullest columns first: 12 groups instead of 24 on a bundle adjustment.
    fullest = np.argsort(-np.diff(columns.indptr), kind="stable")
    group = np.asarray(group_columns(columns, fullest))
    rows = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr))
    of = pattern.indices
    groups = []
    for g in range(int(group.max()) + 1 if group.size else 0):
        places = np.flatnonzero(group[of] == g)
        groups.append((group == g, places, rows[places], of[places]))
    return Sparsity(pattern.indptr, pattern.indices, groups, pattern.shape)


def grouped(
    diff: Differences, structure: Sparsity, evaluate: Evaluate, x: np.ndarray, r: np.ndarray
) -> Any:
    """Sparse Jacobian (m, n), CSR: one evaluation (two if central) for each group of columns."""
    from scipy.sparse import csr_array

    h, one_sided = diff.steps(x)
    if diff.held is not None:
        h = np.where(diff.held, 0.0, h)
    data = np.zeros(structure.indices.shape, dtype=r.dtype)
    points = (p for g in structure.groups for p in _group_points(diff.kind, x, h * g[0], one_sided))
    values = iter(diff.map(evaluate, points))
    safe = np.where(h == 0, 1.0, h)
    for _, places, i, j in structure.groups:
        slope = _group_slopes(diff.kind, values, r, i, safe[j], one_sided[j])
        data[places] = np.where(h[j] == 0, 0.0, slope) if diff.held is not None else slope
    return csr_array((data, structure.indices, structure.indptr), shape=structure.shape)


def _group_points(
    kind: str, x: np.ndarray, step: np.ndarray, one_sided: np.ndarray
) -> Iterator[np.ndarray]:
    """The points at which a group of columns is evaluated at once."""
    if kind == "cs":
        yield x + 1j * step
    elif kind == "2-point":
        yield x + step
    else:
        yield x + np.where(one_sided, 2 * step, -step)
        yield x + step


def _group_slopes(
    kind: str,
    values: Iterator[np.ndarray],
    r: np.ndarray,
    i: np.ndarray,
    h: np.ndarray,
    one_sided: np.ndarray,
) -> np.ndarray:
    """The difference formula at the entries (rows i, steps h) of one group."""
    if kind == "cs":
        return np.asarray(next(values).imag[i] / h)
    if kind == "2-point":
        return np.asarray((next(values)[i] - r[i]) / h)
    far, near = next(values)[i], next(values)[i]
    forward = (4.0 * (near - r[i]) - (far - r[i])) / (2.0 * h)
    return np.where(one_sided, forward, (near - far) / (2.0 * h))
