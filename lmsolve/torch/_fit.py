"""`fit`: train a network on a data set, to the end."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.optimize import OptimizeResult
from torch import Tensor, nn

from . import _checkpoint
from ._data import Samples
from ._descent import Descent
from ._losses import ResidualFunction
from ._optimizer import check_devices
from ._run import Run
from ._session import Options, Session, warn_notes


def fit(
    model: nn.Module,
    data: Any,
    *,
    residual: ResidualFunction | None = None,
    loss: str | None = None,
    weights: Tensor | None = None,
    weight_decay: float = 0.0,
    batch_size: int | None = None,
    grow_batches: bool = False,
    max_steps: int = 100,
    max_seconds: float | None = None,
    ftol: float = 1e-12,
    xtol: float = 1e-12,
    gtol: float = 1e-12,
    callback: Callable[[OptimizeResult], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_steps: int | None = 100,
    checkpoint_seconds: float | None = None,
    resume: str | os.PathLike[str] | None = None,
    memory: int | None = None,
    dtype: torch.dtype | None = None,
    linalg: str = "torch",
    devices: Sequence[torch.device | str] | None = None,
    acceleration: bool = True,
    sketch: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> OptimizeResult:
    """Train a network by Levenberg-Marquardt.

    Parameters
    ----------
    model : torch.nn.Module
        The network. Parameters that do not require grad stay as they are. On return it holds the
        best parameters found, on its own device and in its own dtype.
    data : pair of pytrees of tensors, Dataset or DataLoader
        Inputs and targets, each with a leading axis of samples. A tuple of inputs becomes the
        model's positional arguments. A DataLoader's batches are used as they come.
    residual : callable, optional
        ``residual(output, target)`` returns residuals of any shape; the cost is half their sum of
        squares. The difference by default.
    loss : {'mse', 'cross_entropy', 'bce', 'poisson', 'huber'}, optional
        A convex loss instead, averaged over samples as torch's function of that name averages it;
        'bce' takes logits, 'poisson' logarithms of rates. The gradient is exact, the curvature is
        the generalised Gauss-Newton matrix.
    weights : Tensor, shape (samples,), optional
        Weight of each sample's part of the cost.
    weight_decay : float, default 0.0
        Adds ``weight_decay / 2 * |x|**2`` to the cost.
    batch_size : int, optional
        Samples in a mini-batch, drawn without replacement, in a new order every epoch. All of them
        by default.
    grow_batches : bool, default False
        Double the mini-batch when steps keep less than half of their gain on the next batch.
    max_steps : int, default 100
        Trials at most, accepted or rejected.
    max_seconds : float, optional
        Seconds at most.
    ftol, xtol, gtol : float, default 1e-12
        Relative decrease of the cost, relative step, and gradient relative to the residuals and
        the size of their derivatives, at which to stop; for a full batch without random numbers
        in the model. 0 turns a test off.
    callback : callable, optional
        Called after each trial with an `OptimizeResult` of ``x``, ``step``, ``epoch`` and the
        trial's entries of ``history``; ends the fit by raising StopIteration.
    checkpoint : path, optional
        File to keep the state in, written whole or not at all.
    checkpoint_steps : int, optional
        Trials between checkpoints, 100 by default; None for none.
    checkpoint_seconds : float, optional
        Seconds between checkpoints.
    resume : path, optional
        Checkpoint to go on from, with the same model, data and options: the same steps follow, to
        the last bit. ``max_steps`` counts from the first start. A path that does not exist starts
        anew.
    memory : int, optional
        Bytes that matrices and blocks of the Jacobian may take; half of the free memory by
        default.
    dtype : torch.dtype, optional
        Compute the model in this dtype instead of its own; torch.float64 for the last digits.
    linalg : {'torch', 'legate', 'legate-split'}, default 'torch'
        Where rows of the Jacobian are computed and added up: in this process, or in Legate's
        tasks, each on the processor (or GPU) of its shard of the samples, on every rank. Every
        rank calls this with the same model and data; the first rank's callback ends the fit.
        With 'legate-split' the model computes rows on ``devices`` and Legate, on other GPUs or on
        CPUs of the same process, adds them up; a wide network's stay on the model's device.
    devices : sequence of torch.device or str, optional
        Devices of the model for ``linalg='legate-split'``, its own among them; slices of the
        batch go to them in turn. The model's own by default.
    acceleration : bool, default True
        Bend steps along the curvature of the residuals, at one more evaluation a trial and far
        fewer trials. Losses other than 'mse' have no use for it.
    sketch : bool, default False
        Two rows of the Jacobian for each sample instead of one for each of its outputs: the
        gradient stays exact, the curvature becomes a random estimate without bias. For
        mini-batches of samples with many outputs, at a fraction of the cost of a step.
    seed : int, default 0
        Of the order of samples, of dropout masks and sketches.
    progress : bool, optional
        A tqdm progress bar; by default where standard error is a terminal.

    Returns
    -------
    OptimizeResult
        ``x`` (n,), ``cost``, ``status``, ``message``, ``success``, ``nfev``, ``njev``, ``nit``
        (accepted steps), ``steps`` (trials), ``epochs``, ``history`` (a dict of lists: cost,
        accepted, ratio, damping, length, samples, seconds, memory in bytes) and ``notes``. With
        mini-batches ``cost`` is that of all the data, and ``x`` the best at the end of an epoch;
        with a DataLoader they are the last.

    Raises
    ------
    ValueError
        If data, model or options cannot be used; the message names what was expected.

    Examples
    --------
    >>> import torch, lmsolve.torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1))
    >>> x = torch.linspace(-1, 1, 200)[:, None]
    >>> result = lmsolve.torch.fit(model, (x, x**3), dtype=torch.float64, max_steps=200)
    >>> result.cost < 1e-6
    True
    """
    _check_limits(max_steps, max_seconds, {"ftol": ftol, "xtol": xtol, "gtol": gtol})
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
    session = Session(model, options, Descent(ftol, xtol, gtol))
    if devices is not None:
        check_devices(listed, session.network.parameters.device)
    samples = Samples(data, weights, batch_size, session.network.parameters, seed)
    run = Run(session, samples, grow_batches)
    run.limits = (max_steps, max_seconds)
    run.callback = callback
    if checkpoint is not None:
        run.checkpoint = checkpoint
        run.schedule = _checkpoint.Schedule(checkpoint_steps, checkpoint_seconds)
    if resume is not None and os.path.exists(resume):
        run.restore(_checkpoint.load(resume))
    bar = _progress_bar(progress, max_steps, run.steps)
    try:
        status = run.loop(bar)
    finally:
        bar.close()
    result = run.result(status)
    session.load(result.x)
    warn_notes(session.notes)
    return result


class _NoBar:
    """A progress bar that shows nothing."""

    def update(self) -> None:
        """One more step."""

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        """Text beside the bar."""

    def close(self) -> None:
        """The end."""


def _progress_bar(progress: bool | None, total: int, done: int) -> Any:
    """A tqdm bar, or a stand-in."""
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, initial=done, unit="step")


def _check_limits(steps: int, seconds: float | None, tolerances: dict[str, float]) -> None:
    if steps < 0:
        raise ValueError(f"`max_steps` must not be negative, got {steps}.")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"`max_seconds` must be positive, got {seconds}.")
    for name, value in tolerances.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be a number >= 0, got {value}.")
