"""Variables that a computing process starts with, whatever started it."""

# Memory that a step gives back stays with the process: a fresh page costs a fault, and a prefill's tensors of 46 MB
# would be mapped anew each time (3 to 9 % of a step on 2 cores).
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 29)}

# oneDNN and torch each keep a product that was compiled for a number of rows, 0.5 MB for both, and 1,024 of them before
# they forget any: prefills of other lengths each, 18 of up to 32 prompts, left 1.1 GB. A step needs at most
# 2 * ROW_SIZES an octave of rows, and the rows of the dense products.
PRODUCTS_ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}

MEMORY_ENVIRONMENT = {**MALLOC_ENVIRONMENT, **PRODUCTS_ENVIRONMENT}

# Spinning OpenMP threads of one process take the cores from the next: 94 instead of 109 tokens/s at batch 32 in a
# prototype with one attention process and two shards on 2 cores.
SHARED_CORES_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}

# A cluster's processes call each other by address, never through the `http_proxy` of their environment. gRPC reads it.
DIRECT_ENVIRONMENT = {"no_grpc_proxy": "0.0.0.0/0,::/0"}
