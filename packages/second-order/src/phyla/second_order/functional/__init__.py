"""Pure functions of the package."""

from phyla.second_order.functional.quadrature import gaussian_density, marchenko_pastur_density, semicircle_density, tridiagonal_quadrature

__all__ = [
    "gaussian_density",
    "marchenko_pastur_density",
    "semicircle_density",
    "tridiagonal_quadrature",
]
