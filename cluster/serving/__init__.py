"""Makes an engine's request of a client's, and text of the tokens that come back. Knows no Ray."""
