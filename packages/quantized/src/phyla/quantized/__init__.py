"""One-bit networks: binarizers for training, and inference on packed bits."""
