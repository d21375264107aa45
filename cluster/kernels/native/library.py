"""Loads the native kernels and names their arguments. Without a library, or on a processor that it does not know, torch
computes (`native()` is None).

M: rows, N: outputs, K: inputs.
"""

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

VARIABLE = "MOE_CLUSTER_KERNELS"  # in the environment: a variant's name, or "off"
LIBRARY_VARIABLE = "MOE_CLUSTER_KERNELS_LIBRARY"  # another library's path: one with sanitizers
VARIANTS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "plain")  # the fastest first
TILES, TILE_INPUTS = "amx_bf16", 32  # multiplies bfloat16 in tiles, where the inputs are a multiple of so many
VERSION = 4  # of the kernels' arguments: moe_version() in dispatch.cpp

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_DTYPES = {**DTYPES, torch.int8: 3, torch.float8_e4m3fn: 4}  # of keys and values: cache_rows.py

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

# The fields of `Kernels` in kernels.h after the name, in its order: result and arguments.
_SIGNATURES: Sequence[tuple[str, type | None, Sequence[type]]] = (
    (
        "linear", None,
        (_INT, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _INT),
    ),
    ("linear_scratch", _LONG, (_INT, _LONG, _LONG)),
    ("read", _LONG, (_POINTER, _LONG, _INT)),
    (
        "attention", None,
        (_INT, _INT, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER, _POINTER,
         _LONG, _LONG, _LONG, _LONG, _LONG, _LONG, _FLOAT, _LONG, _POINTER, _LONG, _POINTER, _INT),
    ),
    ("attention_scratch", _LONG, (_INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _INT)),
    (
        "experts", None,
        (_INT, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER,
         _POINTER, _INT),
    ),
    ("experts_scratch", _LONG, (_INT, _LONG, _LONG, _LONG, _LONG, _LONG)),
    (
        "choose_tokens", None,
        (_INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG,
         _POINTER, _POINTER, _LONG, _POINTER, _INT),
    ),
    ("choose_tokens_scratch", _LONG, (_LONG, _LONG)),
    ("uniform_numbers", None, (_POINTER, _POINTER, _POINTER, _LONG)),
    (
        "linear_quantized", None,
        (_INT, _INT, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _INT),
    ),
    ("quantized_scratch", _LONG, (_INT, _INT, _LONG, _LONG)),
    ("route", None, (_INT, _POINTER, _LONG, _LONG, _LONG, _INT, _POINTER, _POINTER, _POINTER, _INT)),
    (
        "experts_quantized", None,
        (_INT, _INT, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _LONG, _LONG, _LONG,
         _LONG, _POINTER, _POINTER, _INT),
    ),
    ("experts_quantized_scratch", _LONG, (_INT, _INT, _LONG, _LONG, _LONG, _LONG, _LONG)),
    ("quantize", None, (_INT, _POINTER, _LONG, _INT, _INT, _INT, _POINTER, _LONG, _LONG, _LONG, _INT)),
    (
        "rms_norm", None,
        (_INT, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _FLOAT, _INT),
    ),
    (
        "rotate_to_cache", None,
        (_INT, _INT, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG,
         _LONG, _LONG, _INT),
    ),
    ("quantize_nf4", None, (_INT, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _LONG, _LONG, _INT)),
)  # fmt: skip


class Native:
    """One variant of the kernels, as kernels.h describes them: pointers are `Tensor.data_ptr()`, or None for null.

    A call releases the interpreter's lock. Its memory must live until it returns.
    """

    linear: Callable[..., None]
    linear_scratch: Callable[..., int]
    read: Callable[..., int]
    attention: Callable[..., None]
    attention_scratch: Callable[..., int]
    experts: Callable[..., None]
    experts_scratch: Callable[..., int]
    choose_tokens: Callable[..., None]
    choose_tokens_scratch: Callable[..., int]
    uniform_numbers: Callable[..., None]
    linear_quantized: Callable[..., None]
    quantized_scratch: Callable[..., int]
    route: Callable[..., None]
    experts_quantized: Callable[..., None]
    experts_quantized_scratch: Callable[..., int]
    quantize: Callable[..., None]
    rms_norm: Callable[..., None]
    rotate_to_cache: Callable[..., None]
    quantize_nf4: Callable[..., None]

    def __init__(self, variant: str, table: int) -> None:
        self.variant, self.table = variant, table
        fields = (ctypes.c_void_p * (1 + len(_SIGNATURES))).from_address(table)
        for (name, result, arguments), address in zip(_SIGNATURES, fields[1:], strict=True):
            assert address, "the table is full"
            setattr(self, name, ctypes.CFUNCTYPE(result, *arguments)(address))

    def __repr__(self) -> str:
        return f"Native({self.variant!r})"


@cache
def native() -> Native | None:
    """The kernels that this process computes with, None where torch does."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return None
    runnable = variants()
    if wanted:
        if wanted not in runnable:
            log.warning("%s=%s: this processor or installation has only %s", VARIABLE, wanted, ", ".join(runnable))
        return runnable.get(wanted)
    return next(iter(runnable.values()), None)


@cache
def variants() -> dict[str, Native]:
    """Every variant that this processor can run, by name, the fastest first."""
    library, _ = _load()
    if library is None:
        return {}
    tables = {name: library.moe_kernels(name.encode()) for name in VARIANTS}
    return {name: Native(name, table) for name, table in tables.items() if table}


@cache
def function(name: str, *arguments: type) -> Callable[..., int] | None:
    """A function of the library beside the kernels, which returns an int32. None without it: on another system."""
    library, _ = _load()
    found = getattr(library, name, None)
    return None if found is None else ctypes.CFUNCTYPE(_INT, *arguments)(ctypes.cast(found, _POINTER).value or 0)


def missing_because() -> str:
    """Why there are no native kernels; "" if there are."""
    return _load()[1]


@cache
def shares_threads() -> bool:
    """Whether kernels run on torch's own threads; if not, each on its caller's thread alone."""
    library, _ = _load()
    return library is not None and _use_openmp(library)


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    path = os.environ.get(LIBRARY_VARIABLE) or next(map(str, Path(__file__).parent.glob("_kernels*.so")), "")
    if not path:
        return None, "not built: no C++17 compiler was there when moe-cluster was installed"
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        return None, f"not loaded: {error}"
    table_size = getattr(library, "moe_table_size", int)()
    if getattr(library, "moe_version", int)() != VERSION or table_size != 1 + len(_SIGNATURES):
        return None, f"not usable: {path} is of another version, install moe-cluster again"
    library.moe_kernels.restype = ctypes.c_void_p
    library.moe_kernels.argtypes = [ctypes.c_char_p]
    _use_openmp(library)
    return library, ""


def _use_openmp(library: ctypes.CDLL) -> bool:
    """Gives the kernels the threads of torch's OpenMP runtime, which is loaded."""
    names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            runtime = ctypes.CDLL(str(path))
            addresses = [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names]
        except (OSError, AttributeError):
            continue
        library.moe_use_openmp(*addresses)
        return True
    return False
