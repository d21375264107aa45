"""transformers' `generate` as a `System`: the baseline. Imported only where it is measured."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

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

    def generate(self, prompts: Prompts, num_tokens: int) -> list[int]:
        token_ids = torch.tensor(prompts, device=self._device)  # [B, P]
        # min_new_tokens keeps EOS from ending a row.
        config = _generation_config(
            do_sample=False, min_new_tokens=num_tokens, max_new_tokens=num_tokens, pad_token_id=0
        )
        with torch.inference_mode():
            output = self._model.generate(
                token_ids, attention_mask=torch.ones_like(token_ids), generation_config=config
            )  # [B, P + num_tokens]
        new_tokens = output[:, token_ids.shape[1] :].tolist()  # on the CPU: the device has finished
        return [len(tokens) for tokens in new_tokens]

    def close(self) -> None:
        self._model = None


def _generation_config(**options: Any) -> Any:
    return GenerationConfig(**options)  # type: ignore[no-untyped-call]
