"""The only room that imports private names of Ray, the reason beside each.

pyproject.toml holds Ray to one minor version: look here first when that changes.
"""
