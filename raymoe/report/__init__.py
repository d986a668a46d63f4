"""What came out: tables of trials."""
