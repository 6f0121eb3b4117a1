"""Backups: a store of objects, chunks, manifests, the archived log, and the way back."""
