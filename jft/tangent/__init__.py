"""Tangent space: models linearized at their base, ``f(theta0) + J(theta0) tau``, and what can be done with them."""

from jft.tangent.curvature import Curvature, merged
from jft.tangent.fisher import fisher_diagonal, squared_batch_sums
from jft.tangent.kernel import KernelCost, KernelProduct, kernel, kernel_cost
from jft.tangent.linearization import Linearized, check_forward_mode, entered, forward, linearize, pair, together
from jft.tangent.regression import LeastSquares, kernel_predict, kernel_regression, least_squares, ridge
from jft.tangent.spectrum import Spectrum, local_energy, localisation, spectrum, top_spectrum
from jft.tangent.sweep import by_layers, by_paths, combined, readings, sweep, tangents

__all__ = [
    "Curvature",
    "KernelCost",
    "KernelProduct",
    "LeastSquares",
    "Linearized",
    "Spectrum",
    "by_layers",
    "by_paths",
    "check_forward_mode",
    "combined",
    "entered",
    "fisher_diagonal",
    "forward",
    "kernel",
    "kernel_cost",
    "kernel_predict",
    "kernel_regression",
    "least_squares",
    "linearize",
    "local_energy",
    "localisation",
    "merged",
    "pair",
    "readings",
    "ridge",
    "spectrum",
    "squared_batch_sums",
    "sweep",
    "tangents",
    "together",
    "top_spectrum",
]
