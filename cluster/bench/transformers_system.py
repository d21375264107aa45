"""transformers' `generate` as a `System`: the baseline. Imported only where it is measured."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from cluster.bench.sampling import GREEDY, Sampling
from cluster.bench.spec import SystemSpec
from cluster.bench.throughput import Prompts


class TransformersSystem:
    """Defaults of the library throughout; prompts of one length, so without padding."""

    def __init__(self, spec: SystemSpec, num_threads: int | None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Any: its own annotations are decorated away.
        model: Any = AutoModelForCausalLM.from_pretrained(spec.model_dir, dtype=getattr(torch, spec.dtype))
        self._model = model.to(self._device).eval()
        # The checkpoint's (penalties, top_k) would cost time that the other systems do not take.
        self._model.generation_config = _generation_config()
        experts = getattr(model.config, "_experts_implementation", None)
        self.detail = f"{self._device}, {torch.get_num_threads()} threads" + (f", experts {experts}" if experts else "")

    def generate(self, prompts: Prompts, num_tokens: int, sampling: Sampling = GREEDY) -> list[int]:
        """One seed for the batch: `generate` has no others."""
        token_ids = torch.tensor(prompts, device=self._device)  # [B, P]
        # min_new_tokens keeps EOS from ending a row.
        config = _generation_config(
            min_new_tokens=num_tokens, max_new_tokens=num_tokens, pad_token_id=0, return_dict_in_generate=True,
            output_logits=sampling.logprobs is not None, **_chosen(sampling),
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.inference_mode():
            output = self._model.generate(
                token_ids, attention_mask=torch.ones_like(token_ids), generation_config=config
            )  # sequences: [B, P + num_tokens]
            if sampling.logprobs is not None:
                for logits in output.logits:  # [B, V] of each step
                    logits.float().log_softmax(dim=-1).topk(sampling.logprobs)
        new_tokens = output.sequences[:, token_ids.shape[1] :].tolist()  # on the CPU: the device has finished
        return [len(tokens) for tokens in new_tokens]

    def close(self) -> None:
        self._model = None


def _chosen(sampling: Sampling) -> dict[str, Any]:
    """Left out is what changes nothing but takes a pass; top_k 0 is set, since the library's own default is 50."""
    chosen: dict[str, Any] = {"do_sample": not sampling.greedy}
    if sampling.repetition_penalty != 1:
        chosen["repetition_penalty"] = sampling.repetition_penalty
    if not sampling.greedy:
        chosen |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        if sampling.min_p:
            chosen["min_p"] = sampling.min_p
    return chosen


def _generation_config(**options: Any) -> Any:
    return GenerationConfig(**options)  # type: ignore[no-untyped-call]
