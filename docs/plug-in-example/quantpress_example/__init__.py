"""An example of a quantpress plug-in: a rounding method, a file format, a server."""
