"""Kolmogorov-Arnold layers with one idea at the centre: a basis is a small value object that plugs into any form of layer."""

from phyla.kan_family import convert, functional
from phyla.kan_family.afkan import AFKAN, AFKANLinear
from phyla.kan_family.attention import AttentionOperator, KANAttention
from phyla.kan_family.bases import (
    RBF,
    RSWAF,
    ActivationPair,
    Basis,
    BasisFunction,
    BSpline,
    Chebyshev,
    Fourier,
    Jacobi,
    Rational,
    ReLUBump,
    Wavelet,
)
from phyla.kan_family.conv import KANConv1d, KANConv2d, KANConv3d
from phyla.kan_family.fitting import FitResult, fit
from phyla.kan_family.linear import KANLinear
from phyla.kan_family.model import KAN, Attribution
from phyla.kan_family.rational import GRKAN, GroupRational, fit_rational, rational_gain
from phyla.kan_family.select import SelectKAN, SelectKANConv2d, SelectKANLinear
from phyla.kan_family.symbolic import SymbolicFit, SymbolicReadout, fit_edge, symbolic_readout
from phyla.kan_family.vision import KATBlock, VisionTransformer, kat_base, kat_small, kat_tiny

__all__ = [
    "AFKAN",
    "GRKAN",
    "KAN",
    "RBF",
    "RSWAF",
    "AFKANLinear",
    "ActivationPair",
    "AttentionOperator",
    "Attribution",
    "BSpline",
    "Basis",
    "BasisFunction",
    "Chebyshev",
    "FitResult",
    "Fourier",
    "GroupRational",
    "Jacobi",
    "KANAttention",
    "KANConv1d",
    "KANConv2d",
    "KANConv3d",
    "KANLinear",
    "KATBlock",
    "Rational",
    "ReLUBump",
    "SelectKAN",
    "SelectKANConv2d",
    "SelectKANLinear",
    "SymbolicFit",
    "SymbolicReadout",
    "VisionTransformer",
    "Wavelet",
    "convert",
    "fit",
    "fit_edge",
    "fit_rational",
    "functional",
    "kat_base",
    "kat_small",
    "kat_tiny",
    "rational_gain",
    "symbolic_readout",
]
