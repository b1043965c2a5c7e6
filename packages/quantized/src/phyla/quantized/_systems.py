"""What `phyla list` shows of this package: system, entry points, paper."""

SYSTEMS: tuple[tuple[str, str, str], ...] = (
    ("BiPer", "BiPer, biper_penalty, set_stage", "BiPer: Binary Neural Networks using a Periodic Function"),
    ("ReCU", "ReCU", "ReCU: Reviving the Dead Weights in Binary Neural Networks"),
    ("IR-Net", "IRNet, EDESign", "Forward and Backward Information Retention for Accurate Binary Neural Networks"),
    (
        "Straight-through signs",
        "SignSTE, ApproxSign, SwishSign",
        "Binarized Neural Networks; Bi-Real Net; BNN+: Improved Binary Network Training",
    ),
    ("ReActNet activations", "RSign, RPReLU", "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions"),
    ("Bop", "Bop", "Latent Weights Do Not Exist: Rethinking Binarized Neural Network Optimization"),
    (
        "Packed inference",
        "pack, PackedLinear, PackedConv1d, PackedConv2d, save_packed, load_packed",
        "the XOR and population-count form of the layers",
    ),
)
