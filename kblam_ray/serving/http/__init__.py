"""The OpenAI-compatible HTTP interface over any `Backend`; nothing here imports torch or Ray."""
