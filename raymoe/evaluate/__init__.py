"""Measure a model's quality: held-out loss, perplexity, exact match."""
