"""`LM`: the solver as an optimizer, one mini-batch at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._data import make_batch
from ._descent import Descent
from ._losses import ResidualFunction
from ._session import Options, Session, warn_notes
from ._setup import gpus_of_legate


class StepResult(NamedTuple):
    """What a step returns.

    Attributes
    ----------
    loss : float
        Cost of the batch after the step.
    terminated : bool
        Whether none of the dampings tried lowers it.
    """

    loss: float
    terminated: bool


class LM:
    """Levenberg-Marquardt with the manners of a torch optimizer, free of a learning rate.

    Parameters
    ----------
    model : torch.nn.Module
        The network to train.
    residual : callable, optional
        ``residual(output, target)`` returns residuals of any shape; their difference by default.
    loss : str, optional
        A convex loss by name instead; see `fit`.
    devices : sequence of torch.device or str, optional
        Devices to compute on; the model must be on one of them. Its own by default, and the only
        one but with ``linalg='legate-split'``.
    weight_decay : float, default 0.0
        Adds ``weight_decay / 2 * |x|**2`` to the cost.
    attempts : int, default 10
        Dampings to try on a batch before the step is given up.
    memory : int, optional
        Bytes that matrices and blocks of the Jacobian may take.
    dtype : torch.dtype, optional
        Compute the model in this dtype instead of its own.
    linalg : {'torch', 'legate', 'legate-split'}, default 'torch'
        Where rows of the Jacobian are computed and added up; see `fit`.
    acceleration : bool, default True
        Bend steps along the curvature of the residuals, at one more evaluation a trial and far
        fewer trials. Losses other than 'mse' have no use for it.
    sketch : bool, default False
        Two rows of the Jacobian for each sample instead of one for each of its outputs; see `fit`.
    seed : int, default 0
        Of dropout masks and sketches.

    Examples
    --------
    >>> import torch, lmsolve.torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1))
    >>> x = torch.linspace(-1, 1, 200)[:, None]
    >>> optimizer = lmsolve.torch.LM(model)
    >>> for _ in range(50):
    ...     loss, terminated = optimizer.step(x, x**3)
    >>> loss < 1e-3
    True
    """

    def __init__(
        self,
        model: nn.Module,
        residual: ResidualFunction | None = None,
        *,
        loss: str | None = None,
        devices: Sequence[torch.device | str] | None = None,
        weight_decay: float = 0.0,
        attempts: int = 10,
        memory: int | None = None,
        dtype: torch.dtype | None = None,
        linalg: str = "torch",
        acceleration: bool = True,
        sketch: bool = False,
        seed: int = 0,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"`attempts` must be at least 1, got {attempts}.")
        listed = tuple(torch.device(d) for d in devices or ())
        options = Options(
            residual,
            loss,
            weight_decay,
            memory,
            dtype,
            linalg,
            seed,
            acceleration,
            listed,
            sketch,
        )
        self._session = Session(model, options, Descent())
        self._attempts = attempts
        self._steps = 0
        if devices is not None:
            check_devices(devices, self._session.network.parameters.device)

    def step(self, inputs: Any, targets: Any, weights: Tensor | None = None) -> StepResult:
        """Take one accepted step on a batch, and leave the new parameters in the model.

        Parameters
        ----------
        inputs, targets : pytree of Tensor
            The batch, on the host or the model's device; a tuple of inputs becomes positional
            arguments.
        weights : Tensor, shape (samples,), optional
            Weight of each sample's part of the cost.

        Returns
        -------
        loss : float
            Cost of the batch after the step.
        terminated : bool
            True if none of the dampings tried lowers the cost of this batch.
        """
        session = self._session
        batch = make_batch(inputs, targets, weights, session.network.parameters, move=True)
        self._take_up_changes()
        session.place(batch, self._steps)
        self._steps += 1
        assert session.state is not None
        accepted = False
        for _ in range(self._attempts):
            accepted = session.trial().accepted
            if accepted or session.state.status is not None:
                break
        if accepted:
            session.update_statistics()
            session.load(session.x)
        notes, session.notes = session.notes, []
        warn_notes(notes)
        return StepResult(session.state.cost, not accepted)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: no gradients are left behind.

        Parameters
        ----------
        set_to_none : bool, default True
            Ignored; there for loops written for torch's optimizers.
        """

    def state_dict(self) -> dict[str, Any]:
        """Damping, scale and counters, in plain types and tensors.

        Returns
        -------
        dict
            For `load_state_dict`, after the model's own.
        """
        started = self._session.state is not None
        return {
            "steps": self._steps,
            "session": self._session.snapshot() if started else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Parameters
        ----------
        state_dict : dict
            State of an optimizer of a model with the same trainable parameters.
        """
        self._steps = state_dict["steps"]
        if state_dict["session"] is not None:
            self._session.restore(state_dict["session"])

    def _take_up_changes(self) -> None:
        """Go on from the model's parameters if somebody has changed them since the last step."""
        session = self._session
        own = session.network.parameters
        values = own.pack(session.model).to(own.dtype)
        if session.state is None:
            session.x0 = values.to(torch.float64)
        elif not torch.equal(values, session.x.to(own_dtype(session)).to(own.dtype)):
            session.state = session.state._replace(x=values.to(torch.float64))


def own_dtype(session: Session) -> torch.dtype:
    """Dtype of the model itself, which may not be the one computed in."""
    return next(p.dtype for p in session.model.parameters() if p.requires_grad)


def check_devices(devices: Sequence[torch.device | str], own: torch.device) -> None:
    """ValueError unless the model's device is among ``devices``."""
    listed = [torch.device(d) for d in devices]
    if not listed:
        raise ValueError(
            "`devices` must name at least one device, got none. If Legate holds all GPUs, start it "
            "with fewer --gpus, use `linalg='legate'`, which shares them, or name 'cpu'."
        )
    same = [d for d in listed if d.type == own.type and (d.index or 0) == (own.index or 0)]
    if not same:
        raise ValueError(
            f"`devices` must include the model's device {own}, got {[str(d) for d in listed]}; "
            "move the model there with `model.to(devices[0])`."
        )


def available_gpus() -> list[torch.device]:
    """GPUs that a model can be put on.

    Returns
    -------
    list of torch.device
        CUDA devices that Legate does not hold, none on a machine without one. A process of Legate
        holds the first ones of those it sees, as many as it was started with.

    Examples
    --------
    >>> import lmsolve.torch
    >>> devices = lmsolve.torch.available_gpus() or ["cpu"]
    """
    held = gpus_of_legate() if "legate.core" in sys.modules else 0
    return [torch.device("cuda", i) for i in range(held, torch.cuda.device_count())]
