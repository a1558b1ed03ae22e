"""One file a server: all that quantpress knows of it."""
