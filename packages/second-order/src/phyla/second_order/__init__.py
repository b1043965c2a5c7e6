"""Second-order methods: M-FAC, curvature operators, spectra, and learning rates."""

from phyla.second_order.inverse_fisher import InverseFisher
from phyla.second_order.inverse_fisher_window import InverseFisherWindow
from phyla.second_order.mfac import MFAC
from phyla.second_order.mfac_pruner import MFACPruner, PruneResult
from phyla.second_order.operator import CurvatureOperator, PreconditionedOperator, adam_preconditioner, as_operator

__all__ = [
    "MFAC",
    "InverseFisher",
    "InverseFisherWindow",
    "MFACPruner",
    "PruneResult",
    "CurvatureOperator",
    "PreconditionedOperator",
    "adam_preconditioner",
    "as_operator",
]
