"""Names the forms that keys and values have in the cache, and counts a row's bytes. Knows no tensors."""

from cluster.errors import SetupError

AUTO = "auto"  # in the dtype that the model computes in
EIGHT_BITS = ("fp8", "int8")
SCALE_BYTES = 2  # behind the numbers of a row in 8 bits: one token's keys, or values, of one head


def check_cache_device(kv_cache_dtype: str, device_type: str) -> None:
    """Raises SetupError for a device that has no attention over such a cache."""
    if kv_cache_dtype != AUTO and device_type == "cuda":
        raise SetupError(
            f"kv_cache_dtype is {kv_cache_dtype!r}: keys and values in 8 bits are read on CPUs only, not on "
            f"{device_type}: set kv_cache_dtype to auto, or device to cpu"
        )
