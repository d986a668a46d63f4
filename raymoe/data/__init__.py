"""Data: rows become instructions, examples, packed sequences and batches."""
