"""Analysis: measurements of a trained model, and figures of them."""
