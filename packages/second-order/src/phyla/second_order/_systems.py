"""What `phyla list` shows of this package: system, entry points, paper."""

SYSTEMS: tuple[tuple[str, str, str], ...] = (
    (
        "M-FAC",
        "MFAC, InverseFisher, InverseFisherWindow, MFACPruner",
        "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
    ),
    (
        "Curvature operators",
        "HessianOperator, GGNOperator, FisherOperator, EmpiricalFisherOperator",
        "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent",
    ),
    (
        "Spectra and traces",
        "lanczos, eigsh, conjugate_gradient, trace, diagonal, spectral_density",
        "Lanczos; Hutch++; XTrace; stochastic Lanczos quadrature",
    ),
    (
        "Learning rates from curvature",
        "estimate_hessian_noise, batch_extremes, max_learning_rate",
        "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training",
    ),
)
