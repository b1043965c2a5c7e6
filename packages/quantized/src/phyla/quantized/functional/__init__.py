"""Pure functions of the package: binarizers of tensors, and arithmetic on packed bits."""
