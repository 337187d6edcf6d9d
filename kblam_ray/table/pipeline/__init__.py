"""The Ray Data job that writes a table: scan, plan, encode, write, commit."""
