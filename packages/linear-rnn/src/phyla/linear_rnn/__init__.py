"""Linear recurrent networks with delta-rule, diagonal and gated state transitions."""

__all__: list[str] = []
