"""Models that open sessions: `hf` for transformers checkpoints, `toy` for tests."""
