"""The pocket pair: a small edge and cloud model with their clips, made from this repository alone."""
