"""Batches to shards over one persistent connection for each pair of processes. Knows sockets; knows no Ray."""
