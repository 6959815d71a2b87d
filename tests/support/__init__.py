"""Fakes, strategies and servers that several tests share."""
