"""One-bit networks: binarizers for training, and inference on packed bits."""

from phyla.quantized import functional
from phyla.quantized.analysis import (
    LayerReport,
    LayerSummary,
    ModelSummary,
    QuantizationError,
    analyze,
    biper_quantization_error,
    laplace_scale,
    quantization_error,
    recu_quantization_error,
    summarize,
)
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
from phyla.quantized.bop import Bop
from phyla.quantized.checkpoints import load_biper_state_dict
from phyla.quantized.convert import binarize_model
from phyla.quantized.flip_rate import FlipRates, flip_rate
from phyla.quantized.folding import FoldedThreshold, fold_threshold
from phyla.quantized.layers import BinaryConv1d, BinaryConv2d, BinaryLinear
from phyla.quantized.models import BinaryBlock, ResNet, resnet18, resnet20, vgg_small
from phyla.quantized.packed import PackedConv1d, PackedConv2d, PackedLinear
from phyla.quantized.packed_block import PackedBlock
from phyla.quantized.packed_file import load_packed, save_packed
from phyla.quantized.packing import pack
from phyla.quantized.react import RPReLU, RSign
from phyla.quantized.recipes import BIPER_CIFAR10, BIPER_IMAGENET, IRNET_CIFAR10, RECU_CIFAR10, Stage, TwoStage

__all__ = [
    "BIPER_CIFAR10",
    "BIPER_IMAGENET",
    "IRNET_CIFAR10",
    "RECU_CIFAR10",
    "ApproxSign",
    "BiPer",
    "Binarizer",
    "BinaryBlock",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryLinear",
    "Bop",
    "EDESign",
    "FlipRates",
    "FoldedThreshold",
    "IRNet",
    "LayerReport",
    "LayerSummary",
    "ModelSummary",
    "PackedBlock",
    "PackedConv1d",
    "PackedConv2d",
    "PackedLinear",
    "QuantizationError",
    "RPReLU",
    "RSign",
    "ReCU",
    "ResNet",
    "SignSTE",
    "Stage",
    "SwishSign",
    "TwoStage",
    "analyze",
    "binarize_model",
    "biper_penalty",
    "biper_quantization_error",
    "flip_rate",
    "fold_threshold",
    "functional",
    "laplace_scale",
    "load_biper_state_dict",
    "load_packed",
    "pack",
    "quantization_error",
    "recu_quantization_error",
    "resnet18",
    "resnet20",
    "save_packed",
    "set_progress",
    "set_stage",
    "summarize",
    "vgg_small",
]
