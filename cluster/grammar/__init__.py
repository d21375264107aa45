"""Grammars that answers keep to: compiled, advanced token by token, made masks of. Alone knows llguidance."""
