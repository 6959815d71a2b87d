"""Models that open sessions: checkpoints, their front ends, dummy weights and memory checks."""
