"""From a client's request to an engine's request, and from tokens back to text. Knows no Ray."""
