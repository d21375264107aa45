"""Offline generation, with the names that users of vLLM know. The engine runs in the caller's thread.

with LLM(model_dir, num_expert_shards=3, transport="ray") as llm:
    outputs = llm.generate(["a prompt", [1, 2, 3]], SamplingParams(temperature=0, max_tokens=16))
"""

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

from torch import Tensor

from cluster.adapting import Adapts
from cluster.chatting import Chats
from cluster.checkpoint.generation import read_sampling_defaults
from cluster.checkpoint.info import model_info
from cluster.checkpoint.model_files import located, pinned, served_name
from cluster.checkpoint.names import checkpoint_shapes, dense_shapes
from cluster.config import DEFAULTS, ClusterConfig, Transport
from cluster.config.lora import AdapterList
from cluster.config.speculation import with_model
from cluster.engine.adapters import AdapterSetup
from cluster.engine.engine import Engine
from cluster.engine.here import compute_here
from cluster.engine.load import device_of, load_engine, local_experts, share_here
from cluster.engine.preflight import check_checkpoint
from cluster.engine.rank_process import ChildRanks
from cluster.errors import Closed, InvalidRequest
from cluster.experts.dispatch import ExpertDispatcher
from cluster.grammar.source import check
from cluster.llm_arguments import check_transport, checked, directories
from cluster.metrics import DispatchMetrics, EngineMetrics, new_registry
from cluster.open_answers import Open, OpenAnswer, OpenResult, complete
from cluster.outcome import Computed, Head, Wants
from cluster.results import Prompts, Results
from cluster.serving.prepare import RequestCompleter
from cluster.serving.text.answer import Answer
from cluster.serving.text.detokenizer import NoText
from cluster.serving.text.prompts import OneAdapter, OneParams, Prompt, to_params, to_prompts
from cluster.serving.text.tokenizer import Tokenizer
from cluster.structured import FIELD
from cluster.types import CompletionOutput, EngineRequest, SamplingParams
from cluster.working import Working

Output = TypeVar("Output")

OWN_ARGUMENTS = ("transport", "skip_tokenizer")  # that are not handed on to a `ClusterConfig` as they are
QUEUE_LIMIT = 1 << 30  # offline, the caller's list is the queue: nothing is refused


class LLM(Results, Chats, Adapts):
    """A checkpoint ready to generate. Not thread-safe. Close it, or use it as a context manager.

    model_dir: its directory, or its name on the Hugging Face hub: "OWNER/NAME", or "OWNER/NAME@REVISION".
    transport: "local" computes the experts in this process; "auto" on `num_expert_shards` Ray actors, on the Ray
    cluster that is connected, else on one of this machine, which several LLMs share and the last to be closed ends;
    the end of the process closes those that are open. "stream" and "ray" name the carrier to them.
    A dense model has no experts to be anywhere: it runs in this process, whatever these two say.
    skip_tokenizer: prompts are token ids only and outputs have no text.
    tensor_parallel_size: processes that share the dense half, this one and its children; on GPUs each has its own.
    lora_adapters: directories by name; `generate` takes the names, `load_adapter` and `unload_adapter` change them.
    The other arguments are fields of `ClusterConfig`, with its defaults.
    Raises SetupError, CheckpointError.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        *,
        num_expert_shards: int = 1,
        transport: Transport = "local",
        skip_tokenizer: bool = DEFAULTS["skip_tokenizer"],
        dtype: str = DEFAULTS["dtype"],
        device: str = DEFAULTS["device"],
        quantization: str = DEFAULTS["quantization"],
        expert_quantization: str | None = DEFAULTS["expert_quantization"],
        kv_cache_dtype: str = DEFAULTS["kv_cache_dtype"],
        kv_cache_bytes: int | None = DEFAULTS["kv_cache_bytes"],
        memory_utilization: float | None = DEFAULTS["memory_utilization"],
        block_size: int = DEFAULTS["block_size"],
        max_num_seqs: int = DEFAULTS["max_num_seqs"],
        max_num_batched_tokens: int = DEFAULTS["max_num_batched_tokens"],
        max_model_len: int | None = DEFAULTS["max_model_len"],
        rope_scaling: Mapping[str, Any] | None = DEFAULTS["rope_scaling"],
        tensor_parallel_size: int = DEFAULTS["tensor_parallel_size"],
        lora_adapters: Mapping[str, str | os.PathLike[str]] | None = DEFAULTS["lora_adapters"],
        max_lora_rank: int = DEFAULTS["max_lora_rank"],
        enable_prefix_caching: bool = DEFAULTS["enable_prefix_caching"],
        speculative_config: Mapping[str, Any] | None = DEFAULTS["speculative_config"],
        cuda_graphs: bool = DEFAULTS["cuda_graphs"],
        cpus_per_expert_shard: float = DEFAULTS["cpus_per_expert_shard"],
        gpus_per_expert_shard: float | None = DEFAULTS["gpus_per_expert_shard"],
    ) -> None:
        options = {name: value for name, value in locals().items() if name in DEFAULTS and name not in OWN_ARGUMENTS}
        model, num_expert_shards, skip_tokenizer = checked(model_dir, num_expert_shards, skip_tokenizer)
        check_transport(transport)
        cluster = ClusterConfig(
            model=pinned(model),
            expert_shards=num_expert_shards,
            transport="auto" if transport == "local" else transport,
            spare_processes=False,
            **options
            | {
                "lora_adapters": directories(lora_adapters),
                "speculative_config": with_model(speculative_config, lambda name: pinned(located(name))),
            },
        )
        self._load(cluster, local=transport == "local", skip_tokenizer=skip_tokenizer)

    def _load(self, cluster: ClusterConfig, *, local: bool, skip_tokenizer: bool) -> None:
        self._request_ids = itertools.count()
        self._close_experts: Callable[[], None] = lambda: None
        self._ranks: ChildRanks | None = None
        self._closed = False
        config = replace(cluster.engine(), max_waiting=QUEUE_LIMIT)
        on_cuda = device_of(config).type == "cuda"  # refuses one that cannot be, before anything loads
        compute_here()
        registry = new_registry()
        dispatch_metrics, metrics = DispatchMetrics(registry, "llm"), EngineMetrics(registry, "llm")
        checkpoint = check_checkpoint(cluster.model, config, cluster.expert_shards, tokenizer=False)
        self._tokenizer = None if skip_tokenizer else Tokenizer(checkpoint.model_dir)
        self.sampling_defaults = read_sampling_defaults(checkpoint.model_dir)
        self.info = model_info(cluster.model, config)
        self._completer = RequestCompleter(self.info, self.sampling_defaults)
        remote = not local and bool(self.info.num_experts)
        share: Callable[[AdapterList], None]
        checkpoint.fetch((dense_shapes if remote else checkpoint_shapes)(checkpoint.config))  # it shows itself
        try:
            with Working(f"loading {served_name(cluster.model)} …"):
                if remote:
                    from cluster.runtime.start.offline import RayExperts  # Ray and Ray Serve take a second

                    elsewhere = RayExperts(cluster, dispatch_metrics)
                    self.experts: ExpertDispatcher = elsewhere.dispatcher
                    self._close_experts, share = elsewhere.close, elsewhere.adapt
                else:
                    self.experts = local_experts(cluster.model, config, cluster.expert_shards, dispatch_metrics)
                    share = share_here(self.experts)
                if config.tensor_parallel_size > 1:
                    self._ranks = ChildRanks(cluster.model, config, on_cuda=on_cuda)
                self.engine: Engine = load_engine(
                    cluster.model,
                    config,
                    self.experts,
                    metrics,
                    remote_experts=not local,
                    adapters=AdapterSetup(share=share),
                    others=self._ranks,
                )
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompts,
        params: OneParams | Iterable[OneParams] | None = None,
        *,
        adapter: OneAdapter = "",
    ) -> list[CompletionOutput]:
        """Answers prompts in their order: texts, token ids in a list, an array or a tensor, or vLLM's
        `{"prompt": …}` and `{"prompt_token_ids": …}`. A lone prompt, `[1, 2, 3]` too, is a list of one.

        params: for all, or one for each; a mapping has the fields of SamplingParams.
        adapter: the name of a LoRA adapter, "" for the base alone, or a list with one for each prompt.
        Raises InvalidRequest before anything is computed (NotFound for an adapter that is not loaded), Unavailable when
        experts stay lost, Closed, RequestFailed for a prompt that meets an exception. The others are answered before:
        the error's `outputs` has their answers in the prompts' order, None for one that failed.
        """
        self._check_open()
        return self.answer(to_prompts(prompts, adapter), params)

    def answer(
        self, prompts: list[Prompt], params: OneParams | Iterable[OneParams] | None = None
    ) -> list[CompletionOutput]:
        """Answers prompts of any kind, conversations too. Raises as `generate`."""
        self._check_open()
        every = to_params(params, len(prompts))
        requests = [self._request(prompt, chosen) for prompt, chosen in zip(prompts, every, strict=True)]
        return self._run([OpenAnswer(request, self._answer(request)) for request in requests])

    def compute(self, prompts: list[Prompt], wants: Wants) -> list[Computed]:
        """One result of numbers for each prompt. Raises as `generate`."""
        self._check_open()
        requests = [
            self._completer.result(
                self._token_ids(prompt),
                wants,
                field=prompt.field,
                request_id=self._next_id(),
                adapter=prompt.adapter,
            )
            for prompt in prompts
        ]
        return self._run([OpenResult(request) for request in requests])

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None with `skip_tokenizer`."""
        return self._tokenizer

    @property
    def head(self) -> Head:
        return self.info.head

    def logits_of(self, hidden_states: Tensor, adapter: str = "") -> Tensor:
        """[T, H] -> [T, V] float32, on the model's device, of rows that this adapter computed. Raises NotFound."""
        found = self.engine.adapters.find(adapter) if adapter else None
        return self.engine.runner.logits(hidden_states, found).float()

    def _run(self, answers: Sequence[Open[Output]]) -> list[Output]:
        """Computes all answers. Raises the first failure, with the outputs of the others."""
        open_answers = {answer.request.request_id: answer for answer in answers}
        try:
            for answer in answers:
                self.engine.submit(answer.request)
            failures = complete(self.engine, open_answers)
        finally:
            for request_id in open_answers:
                self.engine.cancel(request_id)
        outputs = [answer.finished for answer in answers]
        if failures:
            failures[0].outputs = outputs
            raise failures[0]
        return [output for output in outputs if output is not None]

    def close(self) -> None:
        """Takes the shards down; later calls raise Closed. Safe to call again."""
        self._closed = True
        self._close_experts()
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("this LLM is closed: make another one")

    def _request(self, prompt: Prompt, params: SamplingParams) -> EngineRequest:
        if params.stop and self._tokenizer is None:
            raise InvalidRequest("stop needs the tokenizer, which skip_tokenizer left out: give stop_token_ids", "stop")
        if params.constraint is not None:
            if self._tokenizer is None:
                raise InvalidRequest(f"{FIELD} needs the tokenizer, which skip_tokenizer left out", FIELD)
            check(params.constraint)
        return self._completer.complete(
            self._token_ids(prompt),
            params,
            field=prompt.field,
            request_id=self._next_id(),
            timeout_s=None,
            adapter=prompt.adapter,
        )

    def _token_ids(self, prompt: Prompt) -> Iterable[int]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        if self._tokenizer is None:
            raise InvalidRequest(f"{prompt.field} needs the tokenizer, which skip_tokenizer left out", prompt.field)
        if prompt.chat is not None:
            return self._tokenizer.encode_chat(prompt.chat)
        assert prompt.text is not None, "a prompt is one of three"
        return self._tokenizer.encode(prompt.text)

    def _answer(self, request: EngineRequest) -> Answer:
        return Answer(self._tokenizer or NoText(), request.params, self.info.eos_token_ids)

    def _next_id(self) -> str:
        return f"llm-{next(self._request_ids)}"
