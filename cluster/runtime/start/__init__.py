"""Starting a server or an `LLM` on Ray, and ending what was started."""
