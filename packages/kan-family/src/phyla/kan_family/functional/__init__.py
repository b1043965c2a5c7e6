"""Pure functions of tensors: the bases, their fused contractions, the rational activation, AF-KAN's reductions, learnable attention."""

from phyla.kan_family.functional.afkan import AFKANSums, afkan_global, afkan_multistep, afkan_spatial, afkan_sums
from phyla.kan_family.functional.attention import learned_attention, learned_attention_weights, simplex_projection
from phyla.kan_family.functional.basis import (
    activation_pair_basis,
    bspline_basis,
    chebyshev_basis,
    fourier_basis,
    jacobi_basis,
    rbf_basis,
    relu_bump_basis,
    rswaf_basis,
    wavelet_basis,
)
from phyla.kan_family.functional.linear import bspline_linear, chebyshev_linear, fourier_linear, rbf_linear, relu_bump_linear
from phyla.kan_family.functional.rational import rational

__all__ = [
    "AFKANSums",
    "activation_pair_basis",
    "afkan_global",
    "afkan_multistep",
    "afkan_spatial",
    "afkan_sums",
    "bspline_basis",
    "bspline_linear",
    "chebyshev_basis",
    "chebyshev_linear",
    "fourier_basis",
    "fourier_linear",
    "jacobi_basis",
    "learned_attention",
    "learned_attention_weights",
    "rational",
    "rbf_basis",
    "rbf_linear",
    "relu_bump_basis",
    "relu_bump_linear",
    "rswaf_basis",
    "simplex_projection",
    "wavelet_basis",
]
