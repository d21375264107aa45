"""Calls of tools in a model's text: reading them, and forms that force them. Knows no protocol and no model."""
