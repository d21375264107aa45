"""Offline generation, with the names that users of vLLM know. The engine runs in the caller's thread.

with LLM(model_dir, num_expert_shards=3, transport="ray") as llm:
    outputs = llm.generate(["a prompt", [1, 2, 3]], SamplingParams(temperature=0, max_tokens=16))
"""

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from cluster import inputs
from cluster.checkpoint.generation import read_sampling_defaults
from cluster.checkpoint.info import model_info
from cluster.config import DEFAULTS, TRANSPORTS, ClusterConfig, Transport
from cluster.config.resources import available_cpus
from cluster.engine.engine import Engine
from cluster.engine.isolation import failure_of
from cluster.engine.load import load_engine, local_experts
from cluster.engine.preflight import check_checkpoint
from cluster.errors import Closed, ClusterError, InvalidRequest, SetupError
from cluster.experts.dispatch import ExpertDispatcher
from cluster.kernels.native.report import log_kernels
from cluster.metrics import DispatchMetrics, EngineMetrics, new_registry
from cluster.runtime.start.offline import RayExperts
from cluster.serving.prepare import RequestCompleter
from cluster.serving.text.answer import Answer
from cluster.serving.text.detokenizer import NoText
from cluster.serving.text.prompts import Prompt, to_params, to_prompts
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import (
    SAMPLING_DEFAULTS,
    CompletionOutput,
    EngineRequest,
    Logprobs,
    SamplingParams,
    SequenceUpdate,
)

OnePrompt = str | Iterable[int] | Mapping[str, Any]
OneParams = SamplingParams | Mapping[str, Any]

QUEUE_LIMIT = 1 << 30  # offline, the caller's list is the queue: nothing is refused


class LLM:
    """A checkpoint ready to generate. Not thread-safe. Close it, or use it as a context manager.

    transport: "local" computes the experts in this process; "auto" on `num_expert_shards` Ray actors, on the Ray
    cluster that is connected, else on one of this machine, which several LLMs share and the last to be closed ends;
    the end of the process closes those that are open. "stream" and "ray" name the carrier to them.
    A dense model has no experts to be anywhere: it runs in this process, whatever these two say.
    skip_tokenizer: prompts are token ids only and outputs have no text.
    The other arguments are fields of `ClusterConfig`, with its defaults.
    Raises SetupError, CheckpointError.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        *,
        num_expert_shards: int = 1,
        transport: Transport = "local",
        skip_tokenizer: bool = False,
        dtype: str = DEFAULTS["dtype"],
        device: str = DEFAULTS["device"],
        kv_cache_bytes: int | None = DEFAULTS["kv_cache_bytes"],
        memory_utilization: float | None = DEFAULTS["memory_utilization"],
        block_size: int = DEFAULTS["block_size"],
        max_num_seqs: int = DEFAULTS["max_num_seqs"],
        max_num_batched_tokens: int = DEFAULTS["max_num_batched_tokens"],
        max_model_len: int | None = DEFAULTS["max_model_len"],
        enable_prefix_caching: bool = DEFAULTS["enable_prefix_caching"],
        cuda_graphs: bool = DEFAULTS["cuda_graphs"],
        cpus_per_expert_shard: float = DEFAULTS["cpus_per_expert_shard"],
        gpus_per_expert_shard: float | None = DEFAULTS["gpus_per_expert_shard"],
    ) -> None:
        model_dir, num_expert_shards, skip_tokenizer = _checked(model_dir, num_expert_shards, skip_tokenizer)
        if transport not in ("local", *TRANSPORTS):
            raise SetupError(f"transport is {transport!r}, one of local, {', '.join(TRANSPORTS)} is needed")
        cluster = ClusterConfig(
            model=str(model_dir.resolve()),
            expert_shards=num_expert_shards,
            transport="auto" if transport == "local" else transport,
            spare_processes=False,
            dtype=dtype,
            device=device,
            kv_cache_bytes=kv_cache_bytes,
            memory_utilization=memory_utilization,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            cuda_graphs=cuda_graphs,
            cpus_per_expert_shard=cpus_per_expert_shard,
            gpus_per_expert_shard=gpus_per_expert_shard,
        )
        self._request_ids = itertools.count()
        self._ray_experts: RayExperts | None = None
        self._closed = False
        self._load(model_dir, cluster, local=transport == "local", skip_tokenizer=skip_tokenizer)

    def _load(self, model_dir: Path, cluster: ClusterConfig, *, local: bool, skip_tokenizer: bool) -> None:
        config = replace(cluster.engine(), max_waiting=QUEUE_LIMIT)
        # torch counts the machine's cores, and knows nothing of a control group's quota.
        torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
        log_kernels()
        registry = new_registry()
        dispatch_metrics = DispatchMetrics(registry, "llm")
        check_checkpoint(model_dir, config, cluster.expert_shards, tokenizer=False)
        self._tokenizer = None if skip_tokenizer else Tokenizer(model_dir)
        self.info = model_info(model_dir, config)
        self._completer = RequestCompleter(self.info, read_sampling_defaults(model_dir))
        if not local and self.info.num_experts:
            self._ray_experts = RayExperts(cluster, dispatch_metrics)
            self.experts: ExpertDispatcher = self._ray_experts.dispatcher
        else:
            self.experts = local_experts(model_dir, config, cluster.expert_shards, dispatch_metrics)
        try:
            self.engine: Engine = load_engine(
                model_dir, config, self.experts, EngineMetrics(registry, "llm"), remote_experts=not local
            )
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: OnePrompt | Iterable[OnePrompt],
        params: OneParams | Iterable[OneParams] | None = None,
    ) -> list[CompletionOutput]:
        """Answers prompts in their order: texts, token ids in a list, an array or a tensor, or vLLM's
        `{"prompt": …}` and `{"prompt_token_ids": …}`. A lone prompt, `[1, 2, 3]` too, is a list of one.

        params: for all, or one for each; a mapping has the fields of SamplingParams.
        Raises InvalidRequest before anything is computed, Unavailable when experts stay lost, Closed, RequestFailed for
        a prompt that meets an exception. The others are answered before: the error's `outputs` has their answers in the
        prompts' order, None for one that failed.
        """
        self._check_open()
        asked = to_prompts(prompts)
        every = to_params(params, len(asked))
        requests = [self._request(prompt, chosen) for prompt, chosen in zip(asked, every, strict=True)]
        open_answers = {request.request_id: _OpenAnswer(request, self._answer(request)) for request in requests}
        answers = list(open_answers.values())
        try:
            for request in requests:
                self.engine.submit(request)
            failures = self._complete(open_answers)
        finally:
            for request_id in open_answers:
                self.engine.cancel(request_id)
        outputs = [answer.finished for answer in answers]
        if failures:
            failures[0].outputs = outputs
            raise failures[0]
        return [output for output in outputs if output is not None]

    def _complete(self, open_answers: dict[str, "_OpenAnswer"]) -> list[ClusterError]:
        """Makes steps until every answer has ended, and takes each out then. Returns errors in the order they came."""
        failures: list[ClusterError] = []
        while open_answers:
            for update in self.engine.step():
                answer = open_answers.get(update.request_id)
                if answer is None:
                    continue
                try:
                    answer.add(update)
                    ended = answer.finished is not None
                except Exception as error:  # noqa: BLE001 it is this answer's alone
                    failures.append(error if isinstance(error, ClusterError) else failure_of(update.request_id, error))
                    ended = True
                if ended:
                    del open_answers[update.request_id]
                    if update.finish_reason is None:  # a stop string, of which the engine knows nothing
                        self.engine.cancel(update.request_id)
        return failures

    def logits(self, token_ids: Iterable[int]) -> Tensor:
        """The logits at every position of a prompt: [T, vocab] float32. Computed in chunks, as a prompt would be.

        The prompt may be as long as the context. Raises InvalidRequest, Unavailable, Closed.
        """
        self._check_open()
        request = EngineRequest(
            request_id=self._next_id(),
            prompt_token_ids=self._completer.prompt(token_ids, "token_ids"),
            params=SAMPLING_DEFAULTS,
        )
        return self.engine.score(request)

    def close(self) -> None:
        """Takes the shards down; later calls raise Closed. Safe to call again."""
        self._closed = True
        if self._ray_experts is not None:
            self._ray_experts.close()
            self._ray_experts = None

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
        token_ids = prompt.token_ids
        if params.stop and self._tokenizer is None:
            raise InvalidRequest("stop needs the tokenizer, which skip_tokenizer left out: give stop_token_ids", "stop")
        if prompt.text is not None:
            if self._tokenizer is None:
                raise InvalidRequest("text needs the tokenizer, which skip_tokenizer left out", "text")
            token_ids = self._tokenizer.encode(prompt.text)
        assert token_ids is not None, "offline prompts are no conversations"
        return self._completer.complete(
            token_ids, params, field=prompt.field, request_id=self._next_id(), timeout_s=None
        )

    def _answer(self, request: EngineRequest) -> Answer:
        return Answer(self._tokenizer or NoText(), request.params, self.info.eos_token_ids)

    def _next_id(self) -> str:
        return f"llm-{next(self._request_ids)}"


def _checked(model_dir: object, num_expert_shards: object, skip_tokenizer: object) -> tuple[Path, int, bool]:
    if not isinstance(model_dir, str | os.PathLike) or "\0" in os.fspath(model_dir):
        raise SetupError(f"model_dir is {inputs.shown(model_dir)}, a checkpoint's directory is needed")
    try:
        num_shards = inputs.whole_number(num_expert_shards, "num_expert_shards")
        skip = inputs.truth_value(skip_tokenizer, "skip_tokenizer")
    except InvalidRequest as error:
        raise SetupError(str(error)) from None
    if num_shards < 0:
        raise SetupError(f"num_expert_shards is {inputs.shown(num_shards)}, at least 0 is needed")
    return Path(model_dir), num_shards, skip


@dataclass(slots=True)
class _OpenAnswer:
    """One answer's pieces. finished: the whole of it, once its last piece has come."""

    request: EngineRequest
    answer: Answer
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finished: CompletionOutput | None = None

    def add(self, update: SequenceUpdate) -> None:
        """Takes an update in. Raises the update's error."""
        delta = self.answer.add(update)
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.finish_reason is None:
            return
        self.finished = CompletionOutput(
            request_id=self.request.request_id,
            prompt_token_ids=self.request.prompt_token_ids,
            token_ids=tuple(self.token_ids),
            text="".join(self.texts),
            finish_reason=delta.finish_reason,
            logprobs=tuple(self.logprobs),
        )
