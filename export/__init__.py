"""What each server's loader demands of an artifact."""
