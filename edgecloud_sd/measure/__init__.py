"""Traces to numbers."""
