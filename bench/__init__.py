"""The benchmark suite: cases, fixtures, baselines, forecasts, load and the report."""
