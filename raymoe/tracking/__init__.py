"""MLflow: the ledger of sweeps and trials, and what is read back from it."""
