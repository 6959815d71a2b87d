"""`python -m bench.report`: what saved benchmarks say, as one HTML file and as Markdown."""
