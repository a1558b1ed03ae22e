"""From a checkpoint and a recipe to a quantized artifact."""
