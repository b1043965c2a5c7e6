"""Pure functions of the package."""
