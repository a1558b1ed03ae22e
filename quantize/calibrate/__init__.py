"""What goes through the model: text, tokens, and what each linear receives of them."""
