"""Second-order methods: M-FAC, curvature operators, spectra, and learning rates."""

from phyla.second_order.conjugate_gradient import CGResult, conjugate_gradient
from phyla.second_order.diagonal import diagonal
from phyla.second_order.eigsh import EigenResult, eigsh
from phyla.second_order.ggn import EmpiricalFisherOperator, FisherOperator, GGNOperator
from phyla.second_order.hessian import HessianOperator
from phyla.second_order.hessian_noise import HessianNoise, batch_extremes, effective_batch_size, estimate_hessian_noise
from phyla.second_order.inverse_fisher import InverseFisher
from phyla.second_order.inverse_fisher_window import InverseFisherWindow
from phyla.second_order.lanczos import LanczosResult, lanczos
from phyla.second_order.learning_rates import max_learning_rate, optimal_sgd, scale_learning_rate
from phyla.second_order.mfac import MFAC
from phyla.second_order.mfac_pruner import MFACPruner, PruneResult
from phyla.second_order.operator import CurvatureOperator, PreconditionedOperator, adam_preconditioner, as_operator
from phyla.second_order.per_sample import per_sample_gradients
from phyla.second_order.spectral_density import SpectralDensity, spectral_density
from phyla.second_order.trace import TraceEstimate, trace

__all__ = [
    "MFAC",
    "CGResult",
    "CurvatureOperator",
    "EigenResult",
    "EmpiricalFisherOperator",
    "FisherOperator",
    "GGNOperator",
    "HessianNoise",
    "HessianOperator",
    "InverseFisher",
    "InverseFisherWindow",
    "LanczosResult",
    "MFACPruner",
    "PreconditionedOperator",
    "PruneResult",
    "SpectralDensity",
    "TraceEstimate",
    "adam_preconditioner",
    "as_operator",
    "batch_extremes",
    "conjugate_gradient",
    "diagonal",
    "effective_batch_size",
    "eigsh",
    "estimate_hessian_noise",
    "lanczos",
    "max_learning_rate",
    "optimal_sgd",
    "per_sample_gradients",
    "scale_learning_rate",
    "spectral_density",
    "trace",
]
