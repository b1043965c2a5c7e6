"""Kolmogorov-Arnold layers with one idea at the centre: a basis is a small value object that plugs into any form of layer."""

from phyla.kan_family import functional as functional
from phyla.kan_family.bases import RBF as RBF
from phyla.kan_family.bases import RSWAF as RSWAF
from phyla.kan_family.bases import ActivationPair as ActivationPair
from phyla.kan_family.bases import Basis as Basis
from phyla.kan_family.bases import BasisFunction as BasisFunction
from phyla.kan_family.bases import BSpline as BSpline
from phyla.kan_family.bases import Chebyshev as Chebyshev
from phyla.kan_family.bases import Fourier as Fourier
from phyla.kan_family.bases import Jacobi as Jacobi
from phyla.kan_family.bases import Rational as Rational
from phyla.kan_family.bases import ReLUBump as ReLUBump
from phyla.kan_family.bases import Wavelet as Wavelet
from phyla.kan_family.conv import KANConv1d as KANConv1d
from phyla.kan_family.conv import KANConv2d as KANConv2d
from phyla.kan_family.conv import KANConv3d as KANConv3d
from phyla.kan_family.linear import KANLinear as KANLinear
from phyla.kan_family.model import KAN as KAN
from phyla.kan_family.model import Attribution as Attribution
