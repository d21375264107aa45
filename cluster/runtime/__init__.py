"""Ray's part: actors, deployments, the Ray carrier, start and stop. The only folder that imports ray."""
