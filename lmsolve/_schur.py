"""Block elimination of sparse normal equations: the Schur complement.

Many sparse problems have a few parameters that touch everything and many that touch little, in
groups that never meet: cameras and points of a bundle adjustment, shared and per-spectrum
parameters of a joint fit. With the many ordered first, J = [ F  K ] and the normal matrix is

    [ B  E ]     B = F'F block diagonal, blocks of a few columns,      E = F'K,
    [ E' C ],    C = K'K,     S = C - E' B^-1 E,

and a solve needs the Cholesky factors of the blocks and of the dense S (k, k). Which columns
form blocks is read off the sparsity: those with few entries, if rows join them to small components
only (D. C. Brown 1958; B. Triggs et al. 2000, "Bundle adjustment - a modern synthesis", section
6.1). A row then belongs to one block at most, and with rows in the order of their blocks each sum
over rows is a sum over neighbours: J'J as a sparse matrix is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ._linalg import Cholesky, LinAlgError

#: Largest block that is eliminated, and largest dense system that is left.
BLOCK, KEPT = 32, 4000
#: Rows of B^-1/2 E that are expanded to dense ones at a time.
CHUNK = 4096
#: Columns with this many times the entries of the others are first tried as the kept ones.
GAP = 4.0
#: Kinds of rows in K, by the columns that they touch, up to which K'K is summed kind by kind.
KINDS = 1000


class Partition(NamedTuple):
    """Columns in blocks, in the order of their slots, and columns that are kept.

    eliminated (e,) and kept (k,) are columns; slots (e,), ascending, are the places of the former
    in ``blocks`` blocks padded to ``size``.
    """

    eliminated: np.ndarray
    kept: np.ndarray
    blocks: int
    size: int
    slots: np.ndarray


@dataclass(frozen=True)
class Layout:
    """Where each entry of a sparse Jacobian goes: into the padded rows of F, or into K.

    Rows are those of J sorted by block, the ones without a block last. ``*_from`` index the data of
    J (CSR); ``slot_to`` the flat rows (f, size) of F; ``starts`` are the first rows of the blocks
    ``filled``. ``spread`` is the pattern of F' over padded slots with places in F as data, and
    ``kinds`` are pairs (places in the data of K, columns of K) of rows alike, or None if too many.
    """

    partition: Partition
    order: np.ndarray
    slot_from: np.ndarray
    slot_to: np.ndarray
    starts: np.ndarray
    filled: np.ndarray
    kept_from: np.ndarray
    kept: Any
    spread: Any
    kinds: list[tuple[np.ndarray, np.ndarray]] | None


def partition(A: Any) -> Partition | None:
    """Blocks in the pattern of a sparse Jacobian (m, n), or None if there are no good ones."""
    m, n = A.shape
    count = np.bincount(A.indices, minlength=n)
    rows = np.repeat(np.arange(m), np.diff(A.indptr))
    for limit in _limits(count):
        small = count <= limit
        kept = np.flatnonzero(~small)
        if kept.size > KEPT or small.sum() < max(64, kept.size):
            continue
        eliminated = np.flatnonzero(small)
        label = _components(rows, A.indices, small, m)[eliminated]
        sizes = np.bincount(label)
        if sizes.max() <= BLOCK and sizes.size > n // (2 * BLOCK):
            order = np.argsort(label, kind="stable")
            first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
            within = np.arange(eliminated.size) - np.repeat(first, sizes)
            size = int(sizes.max())
            slots = label[order] * size + within
            return Partition(eliminated[order], kept, int(sizes.size), size, slots)
    return None


def _limits(count: np.ndarray) -> list[float]:
    """Entries that an eliminated column may have: up to the widest gap, else the most that do."""
    ordered = np.sort(count)
    jumps = ordered[1:] / np.maximum(ordered[:-1], 1)
    quantiles = np.quantile(count, (0.999, 0.99, 0.97, 0.9, 0.75, 0.5)).tolist()
    widest = int(np.argmax(jumps)) if jumps.size else 0
    return [float(ordered[widest]), *quantiles] if jumps.max(initial=0.0) >= GAP else quantiles


def _components(rows: np.ndarray, columns: np.ndarray, small: np.ndarray, m: int) -> np.ndarray:
    """Labels (n,) from 0 of the components into which rows join the small columns; -1 elsewhere."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    n = small.size
    edges = small[columns]
    i, j = rows[edges] + n, columns[edges]
    graph = csr_array((np.ones(i.size, dtype=np.int8), (i, j)), shape=(n + m, n + m))
    _, label = connected_components(graph, directed=False)
    found = np.full(n, -1)
    _, found[small] = np.unique(label[:n][small], return_inverse=True)
    return found


def remembered(A: Any, memory: dict[str, Any], name: str, find: Callable[[Any], Any]) -> Any:
    """``find(A)``, found once for matrices (CSR) of one pattern."""
    pattern, found = memory.get(name, (None, None))
    if pattern is None or not all(map(np.array_equal, pattern, (A.indptr, A.indices))):
        found = find(A)
        memory[name] = (A.indptr.copy(), A.indices.copy()), found
    return found


def layout(A: Any) -> Layout | None:
    """The places of all entries of a sparse Jacobian (CSR), or None if it has no good blocks."""
    from scipy.sparse import csr_array

    p = partition(A)
    if p is None:
        return None
    m, n = A.shape
    slot, place = np.full(n, -1), np.full(n, -1)
    slot[p.eliminated], place[p.kept] = p.slots, np.arange(p.kept.size)
    rows = np.repeat(np.arange(m), np.diff(A.indptr))
    of = slot[A.indices]
    inside = of >= 0
    block = np.full(m, p.blocks)
    block[rows[inside]] = of[inside] // p.size
    order = np.argsort(block, kind="stable")
    rank = np.empty(m, dtype=np.intp)
    rank[order] = np.arange(m)
    block = block[order]
    joined = int(np.searchsorted(block, p.blocks))
    starts = np.flatnonzero(np.diff(block[:joined], prepend=-1))
    # K, with its rows in the new order.
    kept_from = np.flatnonzero(~inside)
    kept_from = kept_from[np.argsort(rank[rows[kept_from]], kind="stable")]
    counts = np.bincount(rank[rows[kept_from]], minlength=m)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    columns = place[A.indices[kept_from]]
    kept = csr_array((np.ones(columns.size), columns, indptr), shape=(m, p.kept.size))
    # F', whose row of slot s holds the rows of its block.
    slot_from = np.flatnonzero(inside)
    slot_to = rank[rows[slot_from]] * p.size + of[slot_from] % p.size
    spread = csr_array(
        (slot_to + 1, (of[slot_from], rank[rows[slot_from]])), shape=(p.blocks * p.size, m)
    )
    spread.data -= 1
    return Layout(
        p, order, slot_from, slot_to, starts, block[starts], kept_from, kept, spread, _kinds(kept)
    )


def _kinds(K: Any) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Rows of a pattern K (CSR) by the columns that they touch, or None if there are too many."""
    # Equal patterns have equal sums of random numbers; that equal sums have equal ones is checked.
    key = K @ np.random.default_rng(0).random(K.shape[1])
    _, first, kind = np.unique(key, return_index=True, return_inverse=True)
    if first.size > KINDS:
        return None
    lengths = np.diff(K.indptr)
    members = np.split(np.argsort(kind, kind="stable"), np.cumsum(np.bincount(kind))[:-1])
    kinds = []
    for row, rows in zip(first.tolist(), members, strict=True):
        columns = K.indices[K.indptr[row] : K.indptr[row + 1]]
        places = K.indptr[rows][:, None] + np.arange(columns.size)
        if (lengths[rows] != columns.size).any() or (K.indices[places] != columns).any():
            return None
        kinds.append((places, columns))
    return kinds


class Eliminated:
    """J'J of a sparse J, given by its data (CSR), laid out for block elimination.

    ``held`` (n,) flags columns that vanish; they get a unit on the diagonal.
    """

    def __init__(self, data: np.ndarray, layout: Layout, held: np.ndarray | None = None) -> None:
        from scipy.sparse import csr_array

        self.layout, p = layout, layout.partition
        joined = (
            layout.order.size if not layout.slot_to.size else layout.slot_to.max() // p.size + 1
        )
        flat = np.zeros(joined * p.size, dtype=data.dtype)
        flat[layout.slot_to] = data[layout.slot_from]
        F = flat.reshape(joined, p.size)
        self.blocks = np.zeros((p.blocks, p.size, p.size), dtype=data.dtype)
        self.blocks[layout.filled] = np.add.reduceat(F[:, :, None] * F[:, None, :], layout.starts)
        empty = np.ones(p.blocks * p.size, dtype=data.dtype)
        empty[p.slots] = 0.0 if held is None else held[p.eliminated]
        _diagonals(self.blocks)[...] += empty.reshape(p.blocks, p.size)
        K = layout.kept
        self.K = csr_array((data[layout.kept_from], K.indices, K.indptr), shape=K.shape)
        spread = layout.spread
        self.Ft = csr_array((flat[spread.data], spread.indices, spread.indptr), shape=spread.shape)
        self.E = self.Ft @ self.K
        self.C = self._kept_gram()
        if held is not None:
            self.C.ravel()[:: p.kept.size + 1] += held[p.kept]

    def _kept_gram(self) -> np.ndarray:
        """C = K'K, dense (k, k)."""
        K, kinds = self.K, self.layout.kinds
        if kinds is None:
            return np.asarray((K.T.tocsr() @ K).toarray())
        C = np.zeros((K.shape[1], K.shape[1]), dtype=K.dtype)
        for places, columns in kinds:
            rows = K.data[places]
            C[columns[:, None], columns] += rows.T @ rows
        return C


def _diagonals(blocks: np.ndarray) -> np.ndarray:
    """A view (b, s) of the diagonals of blocks (b, s, s)."""
    return np.einsum("bii->bi", blocks)


def _dense_rows(A: Any) -> Iterator[np.ndarray]:
    """The rows of a CSR matrix, dense, CHUNK at a time and in the same memory."""
    from scipy.sparse import csr_array

    m, k = A.shape
    buffer = np.empty((min(m, CHUNK), k), dtype=A.dtype)
    for start in range(0, m, CHUNK):
        indptr = A.indptr[start : start + CHUNK + 1]
        part = slice(indptr[0], indptr[-1])
        rows = csr_array((A.data[part], A.indices[part], indptr - indptr[0]), (indptr.size - 1, k))
        dense = buffer[: indptr.size - 1]
        dense.fill(0.0)
        yield rows.toarray(out=dense)


class SchurComplement:
    """Factor of M + mu I, M as laid out by `Eliminated`; LinAlgError if it is not definite."""

    def __init__(self, matrix: Eliminated, mu: float) -> None:
        from scipy.sparse import csr_array

        self._matrix, p = matrix, matrix.layout.partition
        L = np.linalg.cholesky(matrix.blocks + mu * np.eye(p.size, dtype=matrix.blocks.dtype))
        inverse = np.linalg.inv(L)
        slots = np.arange(p.blocks * p.size)
        columns = np.repeat(slots.reshape(p.blocks, 1, p.size), p.size, axis=1)
        indptr = np.arange(0, slots.size * p.size + 1, p.size)
        #: L^-1 of all blocks, (b s, b s).
        self._inverse = csr_array((inverse.ravel(), columns.ravel(), indptr))
        self.pivot = float(_diagonals(L).min() ** 2)
        k = p.kept.size
        if k:
            S = matrix.C + mu * np.eye(k, dtype=matrix.C.dtype)
            rows = self._inverse @ matrix.E
            for Y in _dense_rows(rows):  # S -= E' B^-1 E as Y'Y with Y = L^-1 E
                S -= Y.T.dot(Y)
            self._dense = Cholesky(np, S)
            self.pivot = min(self.pivot, self._dense.pivot)
        if not np.isfinite(self.pivot):
            raise LinAlgError("the matrix is not finite")

    def solve(self, b: np.ndarray) -> np.ndarray:
        """Solution (n,) of (M + mu I) x = b."""
        p, E = self._matrix.layout.partition, self._matrix.E
        x = np.empty_like(b)
        padded = np.zeros(p.blocks * p.size, dtype=b.dtype)
        padded[p.slots] = b[p.eliminated]
        if p.kept.size:
            x_k = self._dense.solve(b[p.kept] - E.T @ self._block_solve(padded))
            x[p.kept] = x_k
            padded -= E @ x_k
        x[p.eliminated] = self._block_solve(padded)[p.slots]
        return x

    def _block_solve(self, b: np.ndarray) -> np.ndarray:
        """B^-1 b over padded slots."""
        return np.asarray(self._inverse.T @ (self._inverse @ b))
