"""Block elimination of sparse normal equations: the Schur complement.

Many sparse problems have a few parameters that touch everything and many that touch little, in
groups that never meet: cameras and points of a bundle adjustment, shared and per-spectrum
parameters of a joint fit. With the many ordered first the normal matrix is

    [ B  E ]                 B block diagonal, blocks of a few columns,
    [ E' C ],                S = C - E' B^-1 E,

and a solve needs the Cholesky factors of the blocks and of the dense S (k, k). Which columns
form blocks is read off the sparsity: those of small degree whose graph falls into small components
(D. C. Brown 1958; B. Triggs et al. 2000, "Bundle adjustment - a modern synthesis", section 6.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ._linalg import Cholesky, LinAlgError

#: Largest block that is eliminated, and largest dense system that is left.
BLOCK, KEPT = 32, 4000
#: Eliminated rows that are expanded to dense ones at a time.
CHUNK = 4096
#: Up to this many entries the expanded rows are kept for the next damping.
DENSE_ENTRIES = 20_000_000


@dataclass(frozen=True)
class Structure:
    """Where each entry of a sparse normal matrix goes: into padded blocks (b, s, s), E, or S.

    eliminated (e,) and kept (k,) are columns; slots (e,) are the places of the former in the flat
    order (b * s), ascending. ``*_from`` index the data of the CSR matrix, ``*_to`` the flat target;
    ``pad`` are diagonal entries of blocks that no column fills.
    """

    eliminated: np.ndarray
    kept: np.ndarray
    blocks: int
    size: int
    slots: np.ndarray
    block_from: np.ndarray
    block_to: np.ndarray
    pad: np.ndarray
    kept_from: np.ndarray
    kept_to: np.ndarray
    cross_from: np.ndarray
    cross_columns: np.ndarray
    cross_indptr: np.ndarray


class Partition(NamedTuple):
    """Columns in blocks, in the order of their slots, and columns that are kept."""

    eliminated: np.ndarray
    kept: np.ndarray
    blocks: int
    size: int
    slots: np.ndarray


def partition(A: Any) -> Partition | None:
    """Blocks in the pattern of a sparse Jacobian (m, n), or None if there are no good ones."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    # Of ones: SciPy's product leaves out entries that happen to vanish.
    ones = csr_array((np.ones(A.indices.shape, dtype=np.float32), A.indices, A.indptr), A.shape)
    gram = csr_array(ones.T.tocsr() @ ones)
    n = gram.shape[0]
    degree = np.diff(gram.indptr)
    for quantile in (0.999, 0.99, 0.97, 0.9, 0.75, 0.5):
        small = degree <= np.quantile(degree, quantile)
        kept = np.flatnonzero(~small)
        if kept.size > KEPT or small.sum() < max(64, kept.size):
            continue
        eliminated = np.flatnonzero(small)
        count, label = connected_components(gram[eliminated][:, eliminated], directed=False)
        sizes = np.bincount(label, minlength=count)
        if sizes.max() <= BLOCK and count > n // (2 * BLOCK):
            order = np.argsort(label, kind="stable")
            first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
            within = np.arange(eliminated.size) - np.repeat(first, sizes)
            size = int(sizes.max())
            slots = label[order] * size + within
            return Partition(eliminated[order], kept, int(count), size, slots)
    return None


def remembered(A: Any, memory: dict[str, Any], name: str, find: Callable[[Any], Any]) -> Any:
    """``find(A)``, found once for matrices (CSR) of one pattern."""
    pattern, found = memory.get(name, (None, None))
    if pattern is None or not all(map(np.array_equal, pattern, (A.indptr, A.indices))):
        found = find(A)
        memory[name] = (A.indptr.copy(), A.indices.copy()), found
    return found


def transposition(A: Any) -> Any:
    """A' (CSR) of a pattern, with the places in A's data for data."""
    from scipy.sparse import csr_array

    return csr_array((np.arange(A.nnz), A.indices, A.indptr), A.shape).T.tocsr()


def layout(gram: Any, p: Partition) -> Structure:
    """The places of all entries of a sparse normal matrix (CSR)."""
    eliminated, kept, blocks, size, slots = p
    n = gram.shape[0]
    slot = np.full(n, -1)
    slot[eliminated] = slots
    place = np.full(n, -1)
    place[kept] = np.arange(kept.size)
    rows, columns = np.repeat(np.arange(n), np.diff(gram.indptr)), gram.indices
    row_out, column_out = slot[rows] >= 0, slot[columns] >= 0
    inside = np.flatnonzero(row_out & column_out)
    i, j = slot[rows[inside]], slot[columns[inside]]
    left = np.flatnonzero(~row_out & ~column_out)
    cross = np.flatnonzero(row_out & ~column_out)
    cross = cross[np.argsort(slot[rows[cross]], kind="stable")]
    counts = np.bincount(np.searchsorted(slots, slot[rows[cross]]), minlength=slots.size)
    empty = np.ones(blocks * size, dtype=bool)
    empty[slots] = False
    pad = np.flatnonzero(empty)
    return Structure(
        eliminated,
        kept,
        blocks,
        size,
        slots,
        block_from=inside,
        block_to=i * size + j % size,
        pad=pad * size + pad % size,
        kept_from=left,
        kept_to=place[rows[left]] * kept.size + place[columns[left]],
        cross_from=cross,
        cross_columns=place[columns[cross]],
        cross_indptr=np.concatenate([[0], np.cumsum(counts)]),
    )


class Eliminated:
    """A sparse symmetric matrix M (n, n) laid out for block elimination; M + mu I is factored."""

    def __init__(self, data: np.ndarray, s: Structure) -> None:
        from scipy.sparse import csr_array

        self.s = s
        k = s.kept.size
        flat = np.zeros(s.blocks * s.size * s.size, dtype=data.dtype)
        flat[s.block_to] = data[s.block_from]
        flat[s.pad] = 1.0
        self.blocks = flat.reshape(s.blocks, s.size, s.size)
        C = np.zeros(k * k, dtype=data.dtype)
        C[s.kept_to] = data[s.kept_from]
        self.C = C.reshape(k, k)
        self.E = csr_array(
            (data[s.cross_from], s.cross_columns, s.cross_indptr), shape=(s.eliminated.size, k)
        )
        self._dense: list[np.ndarray] | None = None
        if s.blocks * s.size * k <= DENSE_ENTRIES:
            self._dense = list(self._expanded())

    def chunks(self) -> Iterable[np.ndarray]:
        """E (b, s, k), dense, a chunk of blocks at a time."""
        return self._expanded() if self._dense is None else self._dense

    def _expanded(self) -> Iterator[np.ndarray]:
        s = self.s
        step = max(CHUNK // s.size, 1)
        for start in range(0, s.blocks, step):
            stop = min(start + step, s.blocks)
            first, last = np.searchsorted(s.slots, (start * s.size, stop * s.size))
            rows = np.zeros(((stop - start) * s.size, s.kept.size), dtype=self.E.dtype)
            rows[s.slots[first:last] - start * s.size] = self.E[first:last].toarray()
            yield rows.reshape(stop - start, s.size, s.kept.size)


class SchurComplement:
    """Factor of M + mu I, M as laid out by `Eliminated`; LinAlgError if it is not definite."""

    def __init__(self, matrix: Eliminated, mu: float) -> None:
        self._matrix, s = matrix, matrix.s
        L = np.linalg.cholesky(matrix.blocks + mu * np.eye(s.size, dtype=matrix.blocks.dtype))
        self._inverse = np.linalg.inv(L)
        self.pivot = float(np.min(np.diagonal(L, axis1=1, axis2=2)) ** 2)
        if s.kept.size:
            S = matrix.C + mu * np.eye(s.kept.size, dtype=matrix.C.dtype)
            start = 0
            for E in matrix.chunks():  # S -= E' B^-1 E as Y'Y with Y = L^-1 E
                Y = np.matmul(self._inverse[start : start + E.shape[0]], E)
                Y = Y.reshape(-1, s.kept.size)
                S -= Y.T.dot(Y)
                start += E.shape[0]
            self._dense = Cholesky(np, S)
            self.pivot = min(self.pivot, self._dense.pivot)
        if not np.isfinite(self.pivot):
            raise LinAlgError("the matrix is not finite")

    def solve(self, b: np.ndarray) -> np.ndarray:
        """Solution (n,) of (M + mu I) x = b."""
        s, E = self._matrix.s, self._matrix.E
        x = np.empty_like(b)
        b_e, b_k = b[s.eliminated], b[s.kept]
        if s.kept.size:
            x_k = self._dense.solve(b_k - E.T @ self._block_solve(b_e))
            x[s.kept] = x_k
            b_e = b_e - E @ x_k
        x[s.eliminated] = self._block_solve(b_e)
        return x

    def _block_solve(self, b: np.ndarray) -> np.ndarray:
        """B^-1 b (e,)."""
        s = self._matrix.s
        padded = np.zeros(s.blocks * s.size, dtype=b.dtype)
        padded[s.slots] = b
        y = np.matmul(self._inverse, padded.reshape(s.blocks, s.size, 1))
        y = np.matmul(np.swapaxes(self._inverse, 1, 2), y)
        return np.asarray(y.reshape(-1)[s.slots])
