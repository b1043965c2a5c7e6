"""One-bit networks: binarizers for training, and inference on packed bits."""

from phyla.quantized import functional
from phyla.quantized.binarizers import (
    ApproxSign,
    Binarizer,
    BiPer,
    EDESign,
    IRNet,
    ReCU,
    SignSTE,
    SwishSign,
    biper_penalty,
    set_progress,
    set_stage,
)
from phyla.quantized.layers import BinaryConv1d, BinaryConv2d, BinaryLinear

__all__ = [
    "ApproxSign",
    "BiPer",
    "Binarizer",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryLinear",
    "EDESign",
    "IRNet",
    "ReCU",
    "SignSTE",
    "SwishSign",
    "biper_penalty",
    "functional",
    "set_progress",
    "set_stage",
]
