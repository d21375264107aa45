"""The layers that model families share. Attribute names are the checkpoints'."""
