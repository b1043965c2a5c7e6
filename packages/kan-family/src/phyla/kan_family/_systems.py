"""What `phyla list` shows of this package: system, entry points, paper."""

SYSTEMS: tuple[tuple[str, str, str], ...] = (
    (
        "B-spline KAN",
        "BSpline, KANLinear, KANConv1d, KANConv2d, KANConv3d, KAN, fit",
        "KAN: Kolmogorov-Arnold Networks; KAN 2.0",
    ),
    ("Symbolic readout", "fit_edge, symbolic_readout", "KAN: Kolmogorov-Arnold Networks"),
    (
        "ReLU-KAN",
        "ReLUBump, KANLinear",
        "ReLU-KAN: New Kolmogorov-Arnold Networks that Only Need Matrix Addition, Dot Multiplication, and ReLU",
    ),
    ("AF-KAN", "ActivationPair, AFKANLinear, AFKAN", "AF-KAN: Activation Function-Based Kolmogorov-Arnold Networks"),
    ("S-KAN, S-ConvKAN", "SelectKANLinear, SelectKANConv2d, SelectKAN", "Activation Space Selectable Kolmogorov-Arnold Networks"),
    (
        "Fourier, Chebyshev, Jacobi, RBF, RSWAF and wavelet KAN",
        "Fourier, Chebyshev, Jacobi, RBF, RSWAF, Wavelet, KANLinear",
        "the bases of FourierKAN, ChebyKAN, JacobiKAN, FastKAN, FasterKAN and Wav-KAN",
    ),
    ("Group-rational KAN", "Rational, GroupRational, GRKAN, fit_rational", "Kolmogorov-Arnold Transformer; FlashKAT"),
    ("KAT", "KATBlock, VisionTransformer, kat_tiny, kat_small, kat_base", "Kolmogorov-Arnold Transformer"),
    (
        "Kolmogorov-Arnold attention",
        "AttentionOperator, KANAttention, VisionTransformer",
        "Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?",
    ),
)
