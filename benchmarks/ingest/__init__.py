"""Ingest beside img2dataset and beside what the machine allows: `python -m benchmarks.ingest`."""
