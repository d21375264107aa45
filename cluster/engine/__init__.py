"""Continuous batching: schedule → run → update. Knows the model and an `Experts`; knows no network and no Ray."""
