"""Expected times, and the draft length they favour."""
