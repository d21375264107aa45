"""moe-cluster: Qwen2-MoE served as an expert-parallel cluster on Ray; dense Qwen2 by attention replicas alone.

`LLM` and `SamplingParams` are the offline API. They are imported when first used: `moe-cluster --help` needs neither
torch nor ray.
"""

from typing import TYPE_CHECKING, Any

from cluster.version import __version__

if TYPE_CHECKING:
    from cluster.llm import LLM
    from cluster.types import CompletionOutput, SamplingParams

__all__ = ["LLM", "CompletionOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from cluster.llm import LLM

        return LLM
    if name in ("CompletionOutput", "SamplingParams"):
        from cluster import types

        return getattr(types, name)
    raise AttributeError(f"module 'cluster' has no attribute {name!r}")
