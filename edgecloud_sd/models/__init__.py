"""Models that open sessions."""
