"""Prints what a process that computes in bfloat16 has in memory beside weights and KV cache, by RssAnon (Linux).

MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=536870912 python tests/own_memory.py CHECKPOINT
"""

import sys
import time
from pathlib import Path

import torch

from cluster import LLM, SamplingParams
from cluster.idle_memory import REST_S

KV_CACHE_BYTES = 300_000_000


def own_mb(weights_bytes: int) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    anonymous = next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
    return (anonymous - weights_bytes - KV_CACHE_BYTES) // 1_000_000


def main(checkpoint: str) -> None:
    weights = sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors"))
    with LLM(checkpoint, kv_cache_bytes=KV_CACHE_BYTES, max_num_batched_tokens=2048, skip_tokenizer=True) as llm:
        print(f"loaded: {own_mb(weights)} MB", flush=True)
        one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        for least, most in ((64, 64), *[(32, 96)] * 10):
            lengths = torch.randint(least, most + 1, (32,)).tolist()
            llm.generate([torch.randint(1, llm.info.vocab_size, (n,)).tolist() for n in lengths], one)
            print(f"after 32 prompts of {least} to {most} tokens: {own_mb(weights)} MB", flush=True)
        time.sleep(REST_S + 2)
        print(f"after a rest: {own_mb(weights)} MB")


if __name__ == "__main__":
    main(sys.argv[1])
