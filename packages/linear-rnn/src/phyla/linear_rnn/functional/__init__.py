"""The recurrences as pure functions of tensors."""

from phyla.linear_rnn.functional.conv import causal_conv1d
from phyla.linear_rnn.functional.delta import delta_product, delta_rule, transition_matrices
from phyla.linear_rnn.functional.dplr import dplr
from phyla.linear_rnn.functional.linear_attention import linear_attention
from phyla.linear_rnn.functional.mlstm import MLSTMState, mlstm

__all__ = [
    "MLSTMState",
    "causal_conv1d",
    "delta_product",
    "delta_rule",
    "dplr",
    "linear_attention",
    "mlstm",
    "transition_matrices",
]
