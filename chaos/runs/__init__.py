"""A run: clients, faults, healing, and what is found out about it afterwards."""
