"""Routers: perplexity, representations, prompts and clusters that they are made from (Ray Data)."""
