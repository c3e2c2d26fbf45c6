"""Benchmarks and measurements; each prints its figures, and writes them where asked."""
