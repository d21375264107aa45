"""Whether a call may be answered: its key, its client's limits, room, draining. Knows no gRPC and no prompts."""
