"""What clients do while faults strike, and what they remember of it."""
