"""How a replica group changes: its epoch is sealed, and the next is founded from its state."""
