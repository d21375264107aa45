"""Starts a server or an `LLM` on Ray, and ends it."""
