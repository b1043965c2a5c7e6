"""Pure functions of the package: binarizers of tensors, and arithmetic on packed bits."""

from phyla.quantized.functional.binarizers import approx_sign, biper, ede_sign, irnet_latent, recu_latent, sign_ste, swish_sign
from phyla.quantized.functional.normalization import normalize_samples

__all__ = [
    "approx_sign",
    "biper",
    "ede_sign",
    "irnet_latent",
    "normalize_samples",
    "recu_latent",
    "sign_ste",
    "swish_sign",
]
