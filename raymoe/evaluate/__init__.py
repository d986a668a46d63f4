"""What a model is worth: held-out loss, perplexity, exact match."""
