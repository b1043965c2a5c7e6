"""DeltaNet and Gated DeltaNet: one reflection a token."""

from typing import Unpack

from phyla.linear_rnn.delta_product import DeltaOptions, DeltaProduct


class DeltaNet(DeltaProduct):
    """Linear RNN with the delta rule: `DeltaProduct` with one step a token, by default without negative eigenvalues and output gate.

    Args: those of `DeltaProduct`, but for `num_householder` and `use_forget_gate`.

    Source: "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", section 4; `allow_neg_eigval=True` is
        "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues".
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        expand_v: float = 1.0,
        allow_neg_eigval: bool = False,
        use_output_gate: bool = False,
        **options: Unpack[DeltaOptions],
    ) -> None:
        super().__init__(
            hidden_size,
            expand_v=expand_v,
            num_householder=1,
            allow_neg_eigval=allow_neg_eigval,
            use_output_gate=use_output_gate,
            **options,
        )


class GatedDeltaNet(DeltaProduct):
    """Linear RNN with the delta rule and a forget gate: `DeltaProduct` with one step a token, the gate, and values of twice the width.

    Args: those of `DeltaProduct`, but for `num_householder` and `use_forget_gate`.

    Source: "Gated Delta Networks: Improving Mamba2 with Delta Rule", section 3.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        expand_v: float = 2.0,
        allow_neg_eigval: bool = False,
        use_output_gate: bool = True,
        **options: Unpack[DeltaOptions],
    ) -> None:
        super().__init__(
            hidden_size,
            expand_v=expand_v,
            num_householder=1,
            allow_neg_eigval=allow_neg_eigval,
            use_forget_gate=True,
            use_output_gate=use_output_gate,
            **options,
        )
