"""The model families on disk, a file each: which keys config.json has, which layers are sparse or slide, which tensors.

A family more is a file here and a line in `registry.py`, a file and a line in `cluster/model/`. Nothing else knows one.
"""
