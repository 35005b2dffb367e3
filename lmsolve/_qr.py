"""QR of the tall rows ``[J, r]``: a triangle, its rank, and the triangle of a damped system.

NumPy's rows are reduced by LAPACK (tpqrt), a block below the triangle of those before it, and the
rows of a large J by as many threads as its BLAS has, a share each: that gains 1.9 of 2 at n = 1000,
LAPACK's own threads nearly nothing. SciPy's wrapper would hold the interpreter's lock meanwhile, so
the threads call the routine that SciPy exports for Cython. All the rest has one thread: SciPy's and
NumPy's, each busy for 0.1 s after its work, would keep ours waiting.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache, reduce
from typing import Any

import numpy as np
from scipy.linalg import blas, cython_lapack, lapack

from ._threads import one_thread, threads
from ._xp import Array, Namespace

LinAlgError = np.linalg.LinAlgError

#: From so many columns on: columns of a panel of Householder reflections, and rows reduced at a
#: time (measured; with 4,000 rows fits of a condition of 1e9 settle more slowly). Not a power of
#: two: the rows of a column-ordered block would share lines of the cache, and copying them takes
#: ten times as long.
BLOCKS = ((500, 32, 520), (250, 16, 520), (64, 4, 520), (4, 4, 1032), (0, 1, 1032))
#: Bytes of a line of the cache, and of the longest vectors of the processor.
LINE = 64
#: From so many columns on BLAS takes several threads for what is done here.
SEVERAL = 64
#: m n^2 from which threads are worth starting: with less they are done before those of BLAS make
#: room.
WORTHWHILE = 5e9
#: Rounds of a power iteration, at most, and what a random vector has at least, in units of its mean
#: part, of the direction that it looks for (less one time in twelve).
ROUNDS, SHARED = 32, 0.1
#: Singular values of J are rounding below this many eps of the largest, or sqrt(m), or n: those of
#: dependent columns came to 1 at m = 1000, to 17 at a million.
NEGLIGIBLE = 64.0


def triangle(xp: Namespace, J: Array, r: Array, d: Array, weights: Array | None = None) -> Array:
    """Upper triangular factor (k, n + 1) of ``[W J diag(d), r]``, k at most n + 1.

    A tall J is reduced block of rows by block of rows, each stacked on the factor of those before
    it, so that no copy exceeds a block (Demmel, Grigori, Hoemmen, Langou 2012, "Communication-
    optimal parallel and sequential QR and LU factorizations", section 2: sequential TSQR).
    """
    if xp is np:
        return _numpy_triangle(J, r, d, weights)
    m, n = J.shape
    rows = max(4 * (n + 1), 8192)
    R = None
    for start in range(0, m, rows):
        stop = min(start + rows, m)  # the standard leaves slices beyond the end undefined
        w = None if weights is None else weights[start:stop]
        block = augmented(xp, J[start:stop, :], r[start:stop], d, w)
        if R is not None:
            block = xp.concat([R, block], axis=0)
        R = xp.linalg.qr(block, mode="reduced")[1]
    return R


def augmented(xp: Namespace, J: Array, r: Array, d: Array, weights: Array | None = None) -> Array:
    """``[W J diag(d), r]`` (m, n + 1)."""
    scaled = J * d[None, :]
    if weights is not None:
        scaled = scaled * weights[:, None]
    return xp.concat([scaled, r[:, None]], axis=1)


def _numpy_triangle(
    J: np.ndarray, r: np.ndarray, d: np.ndarray, weights: np.ndarray | None
) -> np.ndarray:
    """`triangle` by LAPACK's QR of a rectangle below a triangle; (n + 1, n + 1)."""
    m, n = J.shape
    # k shares take 2 m n^2 / k operations at once, and 2/3 k n^3 to merge: least for this k.
    shares = min(threads(), math.isqrt(3 * m // (n + 1))) if m * n * n >= WORTHWHILE else 1

    def reduced(start: int, stop: int) -> np.ndarray:
        w = None if weights is None else weights[start:stop]
        return _reduced(J[start:stop], r[start:stop], w)

    with _alone(n) if shares <= 1 else one_thread():
        if shares <= 1:
            R = reduced(0, m)
        else:
            cuts = [m * i // shares for i in range(shares + 1)]
            with ThreadPoolExecutor(shares) as pool:
                triangles = list(pool.map(reduced, cuts[:-1], cuts[1:]))
            R = reduce(lambda R, below: _stacked(R, below, n + 1), triangles)
    with np.errstate(over="ignore", invalid="ignore"):
        R[:, :n] *= d  # reflections do not depend on the scale of a column
        if not np.isfinite(R.sum()):
            raise LinAlgError("the matrix is not finite")
    return R


def _reduced(J: np.ndarray, r: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Triangle (n + 1, n + 1) of ``[W J, r]``, in one thread."""
    m, n = J.shape

    def take(start: int, stop: int, block: np.ndarray) -> np.ndarray:
        np.copyto(block[:, :n], J[start:stop])
        block[:, n] = r[start:stop]
        if weights is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                block[:, :n] *= weights[start:stop, None]
        return block

    R = np.zeros((n + 1, n + 1), dtype=J.dtype, order="F")
    first = n + 1 if n < m and _factor_in_place(take(0, n + 1, R)) else 0
    rows = min(m - first, _blocks(n + 1)[1])
    block = _aligned(rows, n + 1, J.dtype)
    for start in range(first, m, rows or 1):
        stop = min(start + rows, m)
        if stop - start < rows:
            block = _aligned(stop - start, n + 1, J.dtype)
        R = _stacked(R, take(start, stop, block), 0)
    return R


def _factor_in_place(A: np.ndarray) -> bool:
    """Put the triangle of A (n, n), Fortran-ordered, in its place; False, and zeros, if not."""
    n, panel = A.shape[0], _blocks(A.shape[0])[0]
    routine = _lapack("geqrt", "iiiririri", A.dtype.char)
    if routine is None:
        A[...] = 0
        return False
    T, work = np.empty((n, panel), dtype=A.dtype), np.empty((n, panel), dtype=A.dtype)
    size, width, info = (ctypes.byref(ctypes.c_int(k)) for k in (n, panel, 0))
    routine(
        size, size, width, A.ctypes.data, size, T.ctypes.data, width, work.ctypes.data, info
    )  # fmt: skip
    for j in range(n):
        A[j + 1 :, j] = 0
    return True


def _aligned(rows: int, columns: int, dtype: Any) -> np.ndarray:
    """An empty column-ordered array that starts where a line of the cache does.

    With `BLOCKS` all of its columns do: reductions take three quarters of the time.
    """
    size = np.dtype(dtype).itemsize
    memory: np.ndarray = np.empty(rows * columns + LINE // size, dtype=dtype)
    skip = -memory.ctypes.data % LINE // size
    return memory[skip : skip + rows * columns].reshape((rows, columns), order="F")


def with_diagonal(R: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """Triangle of R (n + 1, n + 1) with the rows ``[diag(diagonal), 0]`` (n, n + 1) below it."""
    n = diagonal.shape[0]
    below = np.zeros((n, n + 1), dtype=R.dtype, order="F")
    np.fill_diagonal(below, diagonal)
    with _alone(n):
        return _stacked(R.copy(order="F"), below, n)


def _stacked(R: np.ndarray, below: np.ndarray, trapezoidal: int) -> np.ndarray:
    """Triangle of R (n, n) and the rows (k, n) below it, the last of them trapezoidal.

    Both are Fortran-ordered, and both are overwritten.
    """
    k, n = below.shape
    panel = _blocks(n)[0]
    routine = _lapack("tpqrt", "iiiiriririri", R.dtype.char)
    if routine is None:
        wrapper = lapack.stpqrt if R.dtype == np.float32 else lapack.dtpqrt
        wrapped: np.ndarray = wrapper(trapezoidal, panel, R, below, overwrite_a=1, overwrite_b=1)[0]
        return wrapped
    T, work = np.empty((n, panel), dtype=R.dtype), np.empty((n, panel), dtype=R.dtype)
    sizes = [ctypes.byref(ctypes.c_int(size)) for size in (k, n, trapezoidal, panel, 0)]
    rows, columns, _, width, info = sizes
    routine(
        *sizes[:4], R.ctypes.data, columns, below.ctypes.data, rows, T.ctypes.data, width,
        work.ctypes.data, info,
    )  # fmt: skip
    return R


def _blocks(n: int) -> tuple[int, int]:
    """Columns of a panel, and rows of a block, for n columns."""
    return next((panel, rows) for least, panel, rows in BLOCKS if n >= least)


@cache
def _lapack(name: str, arguments: str, kind: str) -> Callable[..., Any] | None:
    """LAPACK's routine for single ("f") or double ("d") precision; a call lets other threads run.

    It takes addresses, of integers ("i") and of real numbers ("r"). None where SciPy's build
    declares another routine.
    """
    capsule = cython_lapack.__pyx_capi__.get(("s" if kind == "f" else "d") + name)
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    if capsule is None:
        return None
    real = "__pyx_t_5scipy_6linalg_13cython_lapack_" + ("s" if kind == "f" else "d")
    types = ", ".join({"i": "int *", "r": f"{real} *"}[argument] for argument in arguments)
    declared = name_of(capsule)
    if declared.decode() != f"void ({types})":
        return None
    return ctypes.CFUNCTYPE(None, *len(arguments) * [ctypes.c_void_p])(
        pointer_of(capsule, declared)
    )


def negligible(m: int, n: int, epsilon: float) -> float:
    """Share of the largest singular value of (m, n) below which another is zero."""
    return epsilon * min(max(m, n), max(n, math.sqrt(m), NEGLIGIBLE))


def has_full_rank(R: np.ndarray, negligible: float) -> bool:
    """Whether an upper triangle R (n, n) clearly has no negligible singular value.

    k rounds of a power iteration from a vector with the part c of an eigenvector come to between
    c^(1/k) and 1 of the largest eigenvalue: here those of R'R and of its inverse.
    """
    R = np.asfortranarray(R)  # once, not in every round
    n = R.shape[0]
    v = w = _anywhere(n).astype(R.dtype)
    trmv = blas.strmv if R.dtype == np.float32 else blas.dtrmv
    with _alone(n), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for rounds in range(1, ROUNDS + 1):
            v = _back_substituted(R, _back_substituted(R, v, True), False)
            w = trmv(R, trmv(R, w), trans=1)
            inverse, largest = float(np.linalg.norm(v)), float(np.linalg.norm(w))
            v, w = v / inverse, w / largest
            found = inverse * largest * negligible**2
            if found * (n / SHARED**2) ** (1.0 / rounds) < 1.0:
                return True
            if not found < 1.0:
                break
    return False


@cache
def _anywhere(n: int) -> np.ndarray:
    """A random unit vector (n,): ones have no part of the null vector of two equal columns."""
    v = np.random.default_rng(n).standard_normal(n)
    unit: np.ndarray = v / np.linalg.norm(v)
    return unit


def back_substituted(R: np.ndarray, c: np.ndarray, transposed: bool = False) -> np.ndarray:
    """Solution (n,) of ``R y = c`` or ``R' y = c``, R an upper triangle; not finite if none."""
    with _alone(R.shape[0]):
        return _back_substituted(R, c, transposed)


def _back_substituted(R: np.ndarray, c: np.ndarray, transposed: bool) -> np.ndarray:
    trsv = blas.strsv if R.dtype == np.float32 else blas.dtrsv
    y: np.ndarray = trsv(R, c, trans=int(transposed))
    return y


def _alone(n: int) -> AbstractContextManager[None]:
    """One BLAS thread, if n columns are enough for it to take more."""
    return one_thread() if n >= SEVERAL else nullcontext()
