"""Pure functions of the package."""

from phyla.second_order.functional.mfac import mfac_factor, mfac_ihvp, obs_prune
from phyla.second_order.functional.quadrature import gaussian_density, marchenko_pastur_density, semicircle_density, tridiagonal_quadrature

__all__ = [
    "gaussian_density",
    "marchenko_pastur_density",
    "mfac_factor",
    "mfac_ihvp",
    "obs_prune",
    "semicircle_density",
    "tridiagonal_quadrature",
]
