"""Second-order methods: M-FAC, curvature operators, spectra, and learning rates."""
