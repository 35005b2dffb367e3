"""The state of a run: what must be kept to go on, and how it is saved.

Everything but ``point``, the residuals and the linearisation at x, is saved: `resume` evaluates
these anew. A resumed run takes the same steps, to the last bit, as one never interrupted.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from ._damping import Damping
from ._files import replacing
from ._xp import Array, convert, to_numpy

#: Version of the file format, raised when a field changes its meaning.
FORMAT = 1


class LMState(NamedTuple):
    """State of a Levenberg-Marquardt run after a trial; immutable.

    Attributes
    ----------
    x : array, shape (n,)
        Best parameters so far.
    cost : float
        Cost at ``x``.
    scale : array, shape (n,), or None
        Running maximum of the column norms of the Jacobian.
    damping : Damping
        Trust radius and damping.
    nfev, njev, nit : int
        Residual evaluations, Jacobians and accepted steps.
    accepted : bool
        Whether the last trial was accepted.
    ratio, length : float
        Gain ratio and scaled length of the last trial step.
    fired : int
        Status of the convergence test that fired on the last trial, 0 for none.
    value, limit : float
        The figure of that test and its tolerance.
    polished, doubts : int
        Polishing steps taken since, and times that polishing found the run not converged.
    escalated : bool
        Whether the normal equations were too ill-conditioned for the last step.
    coarse : bool
        Whether single precision has been too coarse a guide for a step of this run.
    central : bool
        Whether differences have gone over to the central formula.
    curvature : float
        Curvature of the robust cost along the last undamped step, in units of the model's.
    linearized : bool
        Whether the problem has been linearised at ``x``, and scale and counters know of it.
    trail : tuple of (array, array)
        The latest polishing points and steps, newest first.
    status : int or None
        Why the run ended, None while it goes on.
    point : object
        Residuals and linearisation at ``x``; never saved.
    """

    x: Array
    cost: float
    scale: Array | None
    damping: Damping
    nfev: int = 1
    njev: int = 0
    nit: int = 0
    accepted: bool = True
    ratio: float = 1.0
    length: float = float("inf")
    fired: int = 0
    value: float = 0.0
    limit: float = 0.0
    polished: int = 0
    doubts: int = 0
    escalated: bool = False
    coarse: bool = False
    central: bool = False
    curvature: float = 1.0
    linearized: bool = False
    trail: tuple[tuple[Array, Array], ...] = ()
    status: int | None = None
    point: Any = None

    def moved(self, like: Array) -> LMState:
        """The state with its arrays in another library, dtype and device.

        Parameters
        ----------
        like : array
            An array of that library, dtype and device.

        Returns
        -------
        LMState
            The state, without its linearisation.
        """
        return self._replace(
            x=convert(self.x, like),
            scale=None if self.scale is None else convert(self.scale, like),
            trail=tuple((convert(x, like), convert(p, like)) for x, p in self.trail),
            point=None,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, atomically: the old file stays until the new one is complete.

        Parameters
        ----------
        path : path-like
            File to write, a NumPy archive.
        """
        fields = {name: value for name, value in self._asdict().items() if name in _SCALARS}
        arrays = {name: np.asarray(value) for name, value in fields.items() if value is not None}
        arrays["x"] = to_numpy(self.x)
        arrays["damping"] = np.array(self.damping)
        arrays["format"] = np.array(FORMAT)
        if self.scale is not None:
            arrays["scale"] = to_numpy(self.scale)
        for i, (x, p) in enumerate(self.trail):
            arrays[f"trail_{i}"] = np.stack([to_numpy(x), to_numpy(p)])
        with replacing(path) as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], like: Array = None) -> LMState:
        """Read a state that `save` wrote.

        Parameters
        ----------
        path : path-like
            File to read.
        like : array, optional
            An array of the library and device that the arrays are to have; NumPy by default.

        Returns
        -------
        LMState
            The state, to be handed to `LevenbergMarquardt.resume`.

        Raises
        ------
        ValueError
            If the file is of another format.
        """
        with np.load(path, allow_pickle=False) as file:
            if "format" not in file or int(file["format"]) != FORMAT:
                raise ValueError(f"`path` must hold a state of format {FORMAT}, got {path!s}.")

            def array(a: np.ndarray) -> Array:
                return a if like is None else convert(a, like)

            trail: list[tuple[Array, Array]] = []
            while f"trail_{len(trail)}" in file:
                x, p = file[f"trail_{len(trail)}"]
                trail.append((array(x), array(p)))
            scalars = {name: file[name].item() for name in _SCALARS if name in file}
            return cls(
                x=array(file["x"]),
                scale=array(file["scale"]) if "scale" in file else None,
                damping=Damping(*file["damping"].tolist()),
                trail=tuple(trail),
                **scalars,
            )


_SCALARS = tuple(
    name for name in LMState._fields if name not in ("x", "scale", "damping", "trail", "point")
)
