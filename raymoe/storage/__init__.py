"""Storage: locations, the store of finished stages, leases on training runs."""
