"""Models: dense models, and what upcycling makes of them."""
