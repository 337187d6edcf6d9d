"""Keeping a table in step with its sources: watch, embed what changed, commit, keep tidy, measure the lag."""
