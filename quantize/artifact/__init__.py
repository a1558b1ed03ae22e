"""An artifact folder, read back as a server would, and converted into another format."""
