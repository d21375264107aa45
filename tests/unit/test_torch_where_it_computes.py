"""Only processes that compute load torch: an engine's, a shard's, an offline one; none loads what it does not use."""

import subprocess
import sys

from cluster.checkpoint.shipped import shipped_directory

MODULES = [
    "cluster.app",
    "cluster.cli.serving",
    "cluster.cli.running",
    "cluster.client",
    "cluster.runtime.control.controller",
    "cluster.runtime.front.attention_replica",
    "cluster.runtime.front.ingress",
    "cluster.runtime.front.node_metrics",
    "cluster.runtime.front.response_store",
    "cluster.runtime.front.supervisor",
    "cluster.runtime.operate",
    "cluster.runtime.start.served",
]
PROGRAM = """
import importlib, sys
for name in sys.argv[3:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, f"{name} loads torch"
from cluster.cli import _parser
_parser()
assert "torch" not in sys.modules, "the command line loads torch"
import cluster.checkpoint.adapters
from cluster.checkpoint.info import model_info
from cluster.config import ClusterConfig, EngineConfig
from cluster.engine.preflight import check_checkpoint
from cluster.runtime.control.expert_facts import read_expert_facts
for model in sys.argv[1:3]:
    check_checkpoint(model, EngineConfig(), 2)
    assert model_info(model, EngineConfig()).num_experts
    assert read_expert_facts(ClusterConfig(model=model)).num_experts
    assert "torch" not in sys.modules, f"{model} is described with torch"
tracing = {"cluster.tracing.spans", "opentelemetry.exporter.otlp"} & set(sys.modules)
assert not tracing, f"nothing is traced, and {tracing} is loaded"
"""


def test_fronts_and_the_controller_do_without_torch(demo_checkpoint):
    models = [str(demo_checkpoint), str(shipped_directory("demo"))]
    program = [sys.executable, "-c", PROGRAM, *models, *MODULES]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


COMPUTES = """
import sys
from cluster import LLM, SamplingParams
with LLM(sys.argv[1], kv_cache_bytes=1 << 20, skip_tokenizer=True) as llm:
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, ignore_eos=True))
unused = {"ray", "fastapi", "grpc", "opentelemetry", "sympy", "torch._dynamo", "torch._inductor", "transformers"}
loaded = unused & set(sys.modules)
assert not loaded, loaded
"""


def test_a_process_that_computes_loads_no_compiler_and_an_offline_one_no_ray(demo_checkpoint):
    """torch's compiler is a second of CPU and 150 MB; Ray with Serve another second. Nor what sends traces."""
    done = subprocess.run(
        [sys.executable, "-c", COMPUTES, str(demo_checkpoint)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
