"""What a run proves or disproves. Each checker says what it claims, and is tested with planted
violations and planted innocence."""
