"""What a layer carries from one piece of a sequence to the next."""

from typing import NamedTuple

from torch import Tensor

from phyla.linear_rnn.functional.mlstm import MLSTMState


class LayerState(NamedTuple):
    """State of a layer after some tokens of N sequences: a pytree of tensors, which no layer ever changes in place.

    Attributes:
        recurrent: the state of the recurrence: (N, heads, K, V), an `MLSTMState` for `MLSTM`.
        conv: the last inputs of each short convolution, (N, W - 1, channels), or of the token shift, (N, 1, hidden_size); empty without.
    """

    recurrent: Tensor | MLSTMState
    conv: tuple[Tensor, ...] = ()
