"""The write-ahead journal: one per node, every replica group in it, one sync for all of them."""
