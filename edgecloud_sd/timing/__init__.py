"""Clocks, links and costs."""
