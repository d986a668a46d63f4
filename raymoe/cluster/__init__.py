"""What there is to compute on: addresses, the connection, room, and what became of nodes."""
