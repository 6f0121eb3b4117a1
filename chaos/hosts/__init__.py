"""Where the nodes of a run live, and what can be done to them there."""
