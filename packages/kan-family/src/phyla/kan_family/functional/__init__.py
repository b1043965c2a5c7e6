"""Pure functions of tensors."""

from phyla.kan_family.functional.basis import activation_pair_basis as activation_pair_basis
from phyla.kan_family.functional.basis import bspline_basis as bspline_basis
from phyla.kan_family.functional.basis import chebyshev_basis as chebyshev_basis
from phyla.kan_family.functional.basis import fourier_basis as fourier_basis
from phyla.kan_family.functional.basis import jacobi_basis as jacobi_basis
from phyla.kan_family.functional.basis import rbf_basis as rbf_basis
from phyla.kan_family.functional.basis import relu_bump_basis as relu_bump_basis
from phyla.kan_family.functional.basis import rswaf_basis as rswaf_basis
from phyla.kan_family.functional.basis import wavelet_basis as wavelet_basis
from phyla.kan_family.functional.linear import bspline_linear as bspline_linear
from phyla.kan_family.functional.linear import chebyshev_linear as chebyshev_linear
from phyla.kan_family.functional.linear import fourier_linear as fourier_linear
from phyla.kan_family.functional.linear import rbf_linear as rbf_linear
from phyla.kan_family.functional.linear import relu_bump_linear as relu_bump_linear
from phyla.kan_family.functional.rational import rational as rational
