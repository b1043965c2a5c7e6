"""Pure functions of the package: binarizers of tensors, and arithmetic on packed bits."""

from phyla.quantized.functional.binarizers import approx_sign, biper, ede_sign, irnet_latent, recu_latent, sign_ste, swish_sign
from phyla.quantized.functional.bits import pack, packed_matmul, unpack
from phyla.quantized.functional.epilogues import packed_conv2d_residual, packed_conv2d_threshold, packed_matmul_threshold
from phyla.quantized.functional.normalization import normalize_samples
from phyla.quantized.functional.packed_conv import packed_conv2d, packed_max_pool2d
from phyla.quantized.functional.paths import kernel_path

__all__ = [
    "approx_sign",
    "biper",
    "ede_sign",
    "irnet_latent",
    "kernel_path",
    "normalize_samples",
    "pack",
    "packed_conv2d",
    "packed_conv2d_residual",
    "packed_conv2d_threshold",
    "packed_matmul",
    "packed_matmul_threshold",
    "packed_max_pool2d",
    "recu_latent",
    "sign_ste",
    "swish_sign",
    "unpack",
]
