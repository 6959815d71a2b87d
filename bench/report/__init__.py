"""`python -m bench.report` writes a report of saved benchmarks as one HTML file and as Markdown."""
