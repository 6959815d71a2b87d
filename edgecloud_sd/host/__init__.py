"""Limits and use of this process."""
