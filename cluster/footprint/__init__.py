"""The traces of a server on its machine: its folder, its processes and its address.

Each server removes its own folder; if it was killed, its keeper does so, or else the next server at its start. Knows no
Ray, and needs nothing but Python: the keeper is a small process.
"""
