"""The recurrences as pure functions of tensors."""

from phyla.linear_rnn.functional.delta import delta_product, delta_rule, transition_matrices
from phyla.linear_rnn.functional.dplr import dplr
from phyla.linear_rnn.functional.linear_attention import linear_attention

__all__ = [
    "delta_product",
    "delta_rule",
    "dplr",
    "linear_attention",
    "transition_matrices",
]
