"""What routers are made from: perplexity, representations, prompts, clusters (Ray Data)."""
