"""Array namespaces: the one module that knows which array libraries exist.

Everything else asks for the namespace ``xp`` of an array and uses the array API standard.
NumPy is answered first and without a look-up table, because a three-parameter fit takes tens of
microseconds and each dispatch costs one of them.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import array_api_compat
import numpy as np
from scipy.linalg.blas import ddot

#: OpenBLAS takes inner products of more entries to several threads.
ONE_THREAD = 10_000

#: The dtype of Python's numbers; NumPy hands out this very object, so `is` will do for `==`.
FLOAT = np.dtype(float)

Array: TypeAlias = Any  # an array of any namespace; no common static type exists for them
Namespace: TypeAlias = Any


class _CuPyNumeric:
    """The namespace of cuPyNumeric, once imported, and what 26.6 lacks of the standard."""

    def __getattr__(self, name: str) -> Any:
        # Before cuPyNumeric is imported every look-up fails, and as Python expects it to.
        return np.bool_ if name == "bool" else getattr(sys.modules.get("cupynumeric"), name)

    @staticmethod
    def astype(a: Array, dtype: Any, copy: bool = True) -> Array:
        """``a`` with another dtype; ``a`` itself where that changes nothing and copy is False."""
        return a if a.dtype == dtype and not copy else a.astype(dtype)

    @staticmethod
    def isdtype(dtype: Any, kind: Any) -> bool:
        """Whether a dtype is of a kind."""
        return bool(np.isdtype(dtype, kind))

    def argsort(self, a: Array, axis: int = -1, stable: bool = True) -> Array:
        """Indices that sort ``a``, stably."""
        return sys.modules["cupynumeric"].argsort(a, axis=axis, kind="stable")


CUPYNUMERIC = _CuPyNumeric()


def is_numpy(xp: Namespace) -> bool:
    """Whether ``xp`` is NumPy itself."""
    return xp is np


def array_namespace(*arrays: Array) -> Namespace:
    """Namespace shared by the arrays; NumPy for plain Python numbers and sequences."""
    for a in arrays:
        if type(a) is not np.ndarray:
            break
    else:
        return np
    known = [a for a in arrays if is_foreign(a)]
    if not known:
        return np
    if any(is_cupynumeric(a) for a in known):
        return CUPYNUMERIC
    return array_api_compat.array_namespace(*known)


def is_array(a: object) -> bool:
    """Whether ``a`` is an array of a known library."""
    return bool(array_api_compat.is_array_api_obj(a)) or is_cupynumeric(a)


def is_foreign(a: object) -> bool:
    """Whether ``a`` is an array of a library other than NumPy."""
    return not isinstance(a, (np.ndarray, np.generic)) and is_array(a)


def is_cupynumeric(a: object) -> bool:
    """Whether ``a`` is a cuPyNumeric array, without importing cuPyNumeric."""
    if "cupynumeric" not in sys.modules:
        return False
    return type(a).__module__.partition(".")[0] == "cupynumeric"


def is_torch(a: object) -> bool:
    """Whether ``a`` is a torch tensor, without importing torch."""
    return bool(array_api_compat.is_torch_array(a))


def is_first_rank() -> bool:
    """Whether this process is the one that prints: the only one, or rank 0 under Legate."""
    core: Any = sys.modules.get("legate.core")
    return core is None or core.get_legate_runtime().node_id == 0


def to_floats(*scalars: Array) -> list[float]:
    """Host values of 0-d arrays, in one transfer: the solver's only synchronisation."""
    if isinstance(scalars[0], np.generic) or all(isinstance(s, float) for s in scalars):
        return [float(s) for s in scalars]  # NumPy's 0-d results live on the host
    xp = array_namespace(*[s for s in scalars if not isinstance(s, float)])
    if xp is np:
        return [float(s) for s in scalars]
    kept = next(s for s in scalars if not isinstance(s, float))
    wide, device = xp.float64, array_api_compat.device(kept)
    stacked = xp.stack(
        [
            xp.asarray(s, dtype=wide, device=device) if isinstance(s, float) else xp.astype(s, wide)
            for s in scalars
        ]
    )
    return [float(v) for v in to_numpy(stacked)]


def to_numpy(a: Array) -> np.ndarray:
    """NumPy array with the values of ``a``: a copy from a device, else a view where possible."""
    if type(a) is np.ndarray:
        return a
    if is_torch(a):
        return np.asarray(a.detach().cpu().numpy())
    return np.asarray(a)


def on_host(xp: Namespace, a: Array) -> Array:
    """``a`` where the solver computes: what a trial has left in Legate's memory is read."""
    return to_numpy(a) if xp is np else a


def convert(a: Array, like: Array) -> Array:
    """``a`` in the namespace, dtype and device of ``like``: the only crossing between libraries."""
    xp = array_namespace(like)
    if xp is np:
        return to_numpy(a).astype(like.dtype, copy=False)
    if is_cupynumeric(like):
        return xp.asarray(to_numpy(a)).astype(like.dtype)
    if array_namespace(a) is not xp:
        a = xp.asarray(np.array(to_numpy(a)), device=array_api_compat.device(like))
    return xp.astype(a, like.dtype, copy=False)


def dot_itself(r: np.ndarray) -> float:
    """``r @ r`` of a NumPy vector in float64; inf, without a warning, where it overflows.

    SciPy's BLAS is faster where it uses one thread. NumPy's is another library with threads of its
    own, and the two keep each other waiting: 8 ms for a product of 0.1.
    """
    if r.shape[0] <= ONE_THREAD:
        return float(ddot(r, r))
    with np.errstate(over="ignore", invalid="ignore"):
        r = r.astype(np.float64, copy=False)
        return float(r.dot(r))


def sum_squares(xp: Namespace, r: Array) -> Array:
    """0-d ``sum(r**2)``, accumulated in float64; inf, without a warning, where it overflows."""
    if xp is np:
        return np.float64(dot_itself(r))
    r = xp.astype(r, xp.float64, copy=False)
    return r @ r


def copied(a: Array) -> Array:
    """A copy of ``a`` that shares nothing with it."""
    if type(a) is np.ndarray or is_cupynumeric(a):
        return a.copy()
    return array_namespace(a).asarray(a, copy=True)


def shares_memory(a: Array, b: Array) -> bool:
    """Whether ``a`` lies where ``b`` does: some functions fill one array at every call."""
    if a is b:
        return True
    if type(a) is np.ndarray is type(b):  # two that own their memory say so in no time
        return (a.base is not None or b.base is not None) and np.may_share_memory(a, b)
    return is_torch(a) and is_torch(b) and a.data_ptr() == b.data_ptr()


def total(xp: Namespace, a: Array) -> Array:
    """0-d sum of all elements, accumulated in float64."""
    return xp.sum(a, dtype=xp.float64)


def norm(xp: Namespace, v: Array) -> Array:
    """0-d Euclidean norm of a vector."""
    return xp.sqrt(v @ v)


def diagonal(xp: Namespace, A: Array) -> Array:
    """Diagonal (n,) of a square matrix (n, n)."""
    return A.diagonal() if xp is np else xp.linalg.diagonal(A)


def is_complex(a: Array) -> bool:
    """Whether an array has a complex dtype."""
    if type(a) is np.ndarray:
        return a.dtype.kind == "c"
    return bool(array_namespace(a).isdtype(a.dtype, "complex floating"))


def all_finite(a: Array) -> bool:
    """Whether every entry is finite; one synchronisation."""
    if type(a) is np.ndarray:
        # A finite sum of squares says it in a tenth of the time; an infinite one says nothing.
        if a.ndim == 1 and a.dtype is FLOAT and a.size and dot_itself(a) < np.inf:
            return True
        return bool(np.isfinite(a).all())
    xp = array_namespace(a)
    return bool(xp.all(xp.isfinite(a)))


def eps(xp: Namespace, dtype: Any) -> float:
    """Unit round-off spacing of a real floating dtype."""
    if xp is np and dtype is FLOAT:
        return 2.0**-52
    return float(xp.finfo(dtype).eps)
