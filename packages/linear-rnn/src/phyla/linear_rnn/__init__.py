"""Linear recurrent networks with delta-rule, diagonal and gated state transitions."""

from phyla.linear_rnn import analysis, functional, tasks
from phyla.linear_rnn.checkpoints import load_fla_state_dict
from phyla.linear_rnn.delta_net import DeltaNet, GatedDeltaNet
from phyla.linear_rnn.delta_product import DeltaProduct, GatedDeltaProduct
from phyla.linear_rnn.functional import MLSTMState
from phyla.linear_rnn.gated_linear_attention import GatedLinearAttention
from phyla.linear_rnn.kimi_delta_attention import KimiDeltaAttention
from phyla.linear_rnn.lm import LinearRNNLM
from phyla.linear_rnn.mamba2 import Mamba2
from phyla.linear_rnn.mlstm import MLSTM
from phyla.linear_rnn.rwkv7 import RWKV7
from phyla.linear_rnn.state import LayerState

__all__ = [
    "MLSTM",
    "RWKV7",
    "DeltaNet",
    "DeltaProduct",
    "GatedDeltaNet",
    "GatedDeltaProduct",
    "GatedLinearAttention",
    "KimiDeltaAttention",
    "LayerState",
    "LinearRNNLM",
    "MLSTMState",
    "Mamba2",
    "analysis",
    "functional",
    "load_fla_state_dict",
    "tasks",
]
