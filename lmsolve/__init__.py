"""Nonlinear least squares by Levenberg-Marquardt, on one CPU core or many GPUs."""

__version__ = "0.1.0"
