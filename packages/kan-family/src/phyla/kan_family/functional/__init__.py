"""Pure functions of tensors."""

from phyla.kan_family.functional.rational import rational as rational
