"""What `verify` looks at: files, tensors, what configs say, the original, a short forward pass."""
