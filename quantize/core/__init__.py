"""What everything stands on: errors, whole files and folders, the machine, strict models."""
