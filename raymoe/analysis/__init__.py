"""What a trained model turned out to be: measurements of it and their figures."""
