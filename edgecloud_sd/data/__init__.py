"""Clips and prompts."""
