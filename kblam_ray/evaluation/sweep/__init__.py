"""Sweeps: every combination of settings as a unit of work that is done once, here or by Ray tasks, and kept."""
