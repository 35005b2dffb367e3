"""Nonlinear least squares by Levenberg-Marquardt, on one CPU core or many GPUs."""

from ._batched import ManyFitsResult, curve_fit_many, least_squares_many
from ._check_jac import JacobianCheck, check_jac
from ._curve_fit import CurveFit, curve_fit
from ._history import Iteration
from ._least_squares import least_squares
from ._leastsq import leastsq
from ._lm import LevenbergMarquardt
from ._result import LeastSquaresResult
from ._state import LMState
from ._uncertainty import Uncertainty

__all__ = [
    "CurveFit",
    "Iteration",
    "JacobianCheck",
    "LMState",
    "LeastSquaresResult",
    "LevenbergMarquardt",
    "ManyFitsResult",
    "Uncertainty",
    "check_jac",
    "curve_fit",
    "curve_fit_many",
    "least_squares",
    "least_squares_many",
    "leastsq",
]
__version__ = "0.1.0"
