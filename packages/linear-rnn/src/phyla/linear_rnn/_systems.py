"""What `phyla list` shows of this package: system, entry points, paper."""

SYSTEMS: tuple[tuple[str, str, str], ...] = (
    (
        "DeltaProduct",
        "DeltaProduct, GatedDeltaProduct",
        "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products",
    ),
    (
        "DeltaNet",
        "DeltaNet",
        "Parallelizing Linear Transformers with the Delta Rule over Sequence Length; "
        "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues",
    ),
    ("Gated DeltaNet", "GatedDeltaNet", "Gated Delta Networks: Improving Mamba2 with Delta Rule"),
    ("Kimi Delta Attention", "KimiDeltaAttention", "Kimi Linear: An Expressive, Efficient Attention Architecture"),
    ("Gated linear attention", "GatedLinearAttention", "Gated Linear Attention Transformers with Hardware-Efficient Training"),
    ("Mamba-2", "Mamba2", "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality"),
    ("RWKV-7", "RWKV7", 'RWKV-7 "Goose" with Expressive Dynamic State Evolution'),
    ("mLSTM", "MLSTM", "xLSTM: Extended Long Short-Term Memory"),
    ("Language model", "LinearRNNLM", "the block of the papers above: embedding, mixer, SwiGLU"),
)
