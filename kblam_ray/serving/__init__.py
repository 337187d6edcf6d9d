"""Answers from live knowledge bases over HTTP: engine, library of memories, registry, and Ray Serve around."""
