"""What quantization cost and gained: measured, reported, released."""
