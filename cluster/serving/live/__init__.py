"""A cluster as it works, for people who watch: readings, shared by all watchers, become pictures and beats.

Knows no network, no HTML and no Ray; `runtime/front/live.py` reads, `openai/live.py` sends.
"""
