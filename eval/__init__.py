"""What the quantization cost and won, measured on the artifact as it lies on disk."""
