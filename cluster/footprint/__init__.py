"""What a server of ours leaves on its machine, folders, processes and its address, and who removes it.

Each has a folder of its own, which it alone removes; when it was killed, its keeper does, and else the next one's
start. Knows no Ray, and needs nothing but Python: the keeper is a small process.
"""
