"""Small random checkpoints with heads, as transformers writes them, and each one compared with its writer."""

import torch
import torch.nn.functional as F
import transformers
from configs import PROMPTS, config, dense

from cluster import LLM

PAD = 4
LABELS = {"0": "bad", "1": "good", "2": "neither"}
SETTINGS = {
    "Qwen2": dense(num_hidden_layers=2),
    "Qwen2Moe": config(num_hidden_layers=2, num_experts=8, num_experts_per_tok=2),
}
HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
PADDED = [*PROMPTS, [7, 8, 9, PAD, PAD], [7, PAD, 8], [PAD, 7, 8, 9, 10, PAD, PAD, PAD], [PAD, PAD]]


class Written:
    """A checkpoint on disk, and the model that wrote it."""

    def __init__(self, model_dir, model):
        self.model_dir, self.model = model_dir, model

    def __call__(self, prompt):
        with torch.inference_mode():
            return self.model(torch.tensor([prompt]))


def write(model_dir, family, head, **changes):
    """Twice the usual deviation, so that logits differ by more than rounding, and a bias that is not zero."""
    raw = {key: value for key, value in SETTINGS[family].items() if key not in ("architectures", "model_type")}
    torch.manual_seed(len(family) + len(head))
    settings = getattr(transformers, f"{family}Config")(**{**raw, "pad_token_id": PAD, "id2label": LABELS, **changes})
    settings._attn_implementation = "eager"
    model = getattr(transformers, f"{family}{head}")(settings).eval()
    for name, weight in model.named_parameters():
        if name in ("score.bias", "qa_outputs.bias"):
            torch.nn.init.normal_(weight.data)
    model.save_pretrained(model_dir)
    return Written(model_dir, model)


def llm_for(model_dir, **options):
    return LLM(
        model_dir, dtype="float32", device="cpu", skip_tokenizer=True, num_expert_shards=2,
        **{"kv_cache_bytes": 1 << 21, **options},
    )  # fmt: skip


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def check(llm, oracle, head):
    """All that this head gives, for all prompts."""
    if head == "Model":
        for prompt, found in zip(PADDED, llm.embed(PADDED, pooling="mean"), strict=True):
            close(found.embedding, F.normalize(oracle(prompt).last_hidden_state[0].mean(dim=0), dim=0))
        for prompt, found in zip(PADDED, llm.embed(PADDED, normalize=False), strict=True):
            close(found.embedding, oracle(prompt).last_hidden_state[0, -1])
    if head == "ForSequenceClassification":
        for prompt, found in zip(PADDED, llm.classify(PADDED), strict=True):
            expected = oracle(prompt).logits[0]
            close(found.logits, expected)
            close(found.probs, expected.softmax(dim=-1))
            assert found.label == LABELS[str(int(expected.argmax()))]
    if head == "ForTokenClassification":
        for prompt, found in zip(PADDED, llm.classify_tokens(PADDED), strict=True):
            expected = oracle(prompt).logits[0]
            close(found.logits, expected)
            assert found.labels == tuple(LABELS[str(i)] for i in expected.argmax(dim=-1).tolist())
            assert found.prompt_token_ids == tuple(prompt)
    if head == "ForQuestionAnswering":
        for prompt, found in zip(PADDED, llm.answer_spans(PADDED), strict=True):
            expected = oracle(prompt)
            close(found.start_logits, expected.start_logits[0])
            close(found.end_logits, expected.end_logits[0])
            assert (found.start, found.end) == naive_span(expected.start_logits[0], expected.end_logits[0])


def naive_span(start_logits, end_logits):
    spans = [(i, j) for i in range(len(start_logits)) for j in range(i, len(end_logits))]
    return max(spans, key=lambda span: float(start_logits[span[0]] + end_logits[span[1]]))
