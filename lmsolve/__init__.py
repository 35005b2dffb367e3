"""Nonlinear least squares by Levenberg-Marquardt, on one CPU core or many GPUs."""

from ._least_squares import Iteration, least_squares
from ._lm import LevenbergMarquardt
from ._result import LeastSquaresResult
from ._state import LMState
from ._uncertainty import Uncertainty

__all__ = [
    "Iteration",
    "LMState",
    "LeastSquaresResult",
    "LevenbergMarquardt",
    "Uncertainty",
    "least_squares",
]
__version__ = "0.1.0"
