"""Kernels in C++ for the CPU, one library with a variant for each kind of processor. `library.py` is the way in."""
