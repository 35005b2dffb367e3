"""`residuals`: a network as a residual function of a flat vector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ._data import make_batch
from ._jacobian import Plan, Point, choose, stream
from ._losses import ResidualFunction, from_residual
from ._network import Network
from ._params import Parameters
from ._problem import available_memory
from ._session import check_parameters, is_stochastic


class NetworkResiduals:
    """Residuals of a network on fixed data, as functions of the flat vector of its parameters.

    Attributes
    ----------
    x0 : Tensor, shape (n,)
        The model's trainable parameters when this was made.
    m, n : int
        Numbers of residuals and parameters.
    note : str
        What slows the Jacobian down, if anything.
    """

    def __init__(self, network: Network, data: Any, plan: Plan) -> None:
        self._network = network
        self._batch = data
        self._plan = plan
        self.x0: Tensor = network.parameters.pack(network.module)
        self.n = network.parameters.n
        self.m = plan.k if plan.coupled else plan.k * data.size
        self.note = plan.note

    def fun(self, x: Tensor) -> Tensor:
        """Compute the residuals.

        Parameters
        ----------
        x : Tensor, shape (n,)
            Parameters.

        Returns
        -------
        Tensor, shape (m,)
            Residuals.
        """
        point = Point(self._network.parameters.unpack(x))
        rows = self._network.judge(point.tensors, self._batch, 1.0).rows
        return rows.detach().reshape(-1)

    def jac(self, x: Tensor) -> Tensor:
        """Compute the Jacobian.

        Parameters
        ----------
        x : Tensor, shape (n,)
            Parameters.

        Returns
        -------
        Tensor, shape (m, n)
            Derivatives of the residuals.
        """
        J = x.new_empty((self.m, self.n))
        done = 0
        for r, rows in self.blocks(x):
            J[done : done + r.shape[0]] = rows
            done += r.shape[0]
        return J

    def blocks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Compute residuals and Jacobian in blocks of rows, so that J is never held.

        Parameters
        ----------
        x : Tensor, shape (n,)
            Parameters.

        Yields
        ------
        tuple of Tensor
            Residuals (rows,) and Jacobian (rows, n), valid until the next pair.
        """
        point = Point(self._network.parameters.unpack(x))
        yield from stream(self._network, self._batch, point, self._plan)

    def load(self, x: Tensor) -> None:
        """Put parameters back into the model.

        Parameters
        ----------
        x : Tensor, shape (n,)
            Parameters, such as the result of a fit.
        """
        self._network.parameters.load(self._network.module, x)


def residuals(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    residual: ResidualFunction | None = None,
    *,
    weights: Tensor | None = None,
    memory: int | None = None,
) -> NetworkResiduals:
    """Make a network a residual function for `lmsolve.least_squares`.

    Parameters
    ----------
    model : torch.nn.Module
        The network. Parameters that do not require grad stay as they are, tied ones count once.
    inputs, targets : pytree of Tensor
        Data on the model's device, with a leading axis of samples. A tuple of inputs becomes the
        model's positional arguments.
    residual : callable, optional
        ``residual(output, target)`` returns residuals of any shape; their difference by default.
    weights : Tensor, shape (samples,), optional
        Weight of each sample's squared residuals.
    memory : int, optional
        Bytes that a block of the Jacobian may take.

    Returns
    -------
    NetworkResiduals
        With ``fun``, ``jac``, ``x0`` and ``load``.

    Raises
    ------
    ValueError
        If the data cannot be used, or if the model's output changes between two calls.

    Examples
    --------
    >>> import torch, lmsolve, lmsolve.torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> model = model.double()
    >>> x = torch.linspace(-1, 1, 100, dtype=torch.float64)[:, None]
    >>> problem = lmsolve.torch.residuals(model, x, x**2)
    >>> result = lmsolve.least_squares(problem.fun, problem.x0, jac=problem.jac, max_nfev=200)
    >>> problem.load(result.x)
    >>> bool((model(x) - x**2).abs().max() < 1e-2)
    True
    """
    parameters = Parameters.of(model)
    check_parameters(parameters, parameters.pack(model))
    batch = make_batch(inputs, targets, weights, parameters)
    network = Network(model, parameters, from_residual(residual))
    point = Point(parameters.unpack(parameters.pack(model)))
    if is_stochastic(network, point, batch):
        raise ValueError(
            "`model` must give the same output for the same data: it draws random numbers "
            "(dropout). Use `model.eval()`, or `lmsolve.torch.fit`, which holds a step's masks."
        )
    plan = choose(network, batch, point, (memory or available_memory(parameters.device)) // 4)
    return NetworkResiduals(network, batch, plan)
