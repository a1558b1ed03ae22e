"""quantpress: from a Hugging Face checkpoint and a recipe to a quantized, measured release."""
