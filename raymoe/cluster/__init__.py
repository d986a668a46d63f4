"""The Ray cluster: its address, the connection, how much room it has, and what becomes of its nodes."""
