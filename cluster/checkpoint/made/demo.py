"""Writes a small, complete `qwen2_moe` directory: weights, tokenizer, chat template, generation defaults.

Its weights are random and its answers gibberish, but every file has the published form: what serves it
serves a released model too. Nothing is downloaded.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from cluster.checkpoint.generation import GENERATION_FILE
from cluster.checkpoint.made.synthetic import write_checkpoint, write_json

ENDOFTEXT, IM_START, IM_END = _SPECIALS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("role '" ~ message['role'] ~ "' is unknown: use system, user or assistant") -}}
    {%- endif -%}
    {%- if message['role'] == 'system' and not loop.first -%}
        {{- raise_exception('a system message must be the first one') -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_MAX_FILE_BYTES = 3_000_000
_CONTEXT_TOKENS = 4096
_VOCAB_SIZE = 1024  # three of them special
# Source: Qwen2's tokenizer.json; digits stay alone.
_PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What the tokenizer is trained on: prose, chat, code, and scripts whose characters take several bytes.
_TEXT = """\
A mixture of experts is a network in which a router chooses, for every token and in every layer, a few
experts out of many. Only the chosen experts compute; the others wait. So a model can know a great deal and
still answer quickly, because most of its weights are not touched by any one token. The weights must all be
held somewhere, though, and that is where a cluster comes in: the experts are spread over many machines, and
the tokens travel to them and back again.
Attention is different. It remembers what has been said: the keys and the values of every token before this
one, kept in blocks so that nothing is wasted. When a request ends its blocks are given back, and the next
request that has been waiting may begin. Requests come and go at every step; none of them has to wait for
the longest one.
What happens when a machine dies? Its experts have copies on other machines, and the rows that were on their
way are sent again. Nobody who reads the answer will notice that anything happened. If there is no copy,
then the request waits until the lost experts have been loaded again, or it fails and says why. It never
pretends.
The old lighthouse keeper climbed the stairs every evening before the sun went down. There were two hundred
and seventeen of them, and he had counted them more often than he could remember. At the top he cleaned the
glass, lit the lamp, and looked out over the water. "Good evening," he said to the sea, and the sea answered
as it always did.
One morning a small boat came in with a torn sail. "Can you help us?" asked the girl at the rudder. "We've
lost our way, and we don't know these rocks." He didn't ask where they had come from; he'd seen many boats,
and they'd all been looking for the same thing. "Come in," he said, "there's bread, and tea, and a chart
that I'll give you."
Hello! How are you today? I'm fine, thank you. What is the capital of France? The capital of France is
Paris.
Please write a short story about a robot who learns to paint. Once upon a time there was a little robot. It
lived in a workshop at the edge of the town, and every day it watched the painter at her work.
Please explain how photosynthesis works. Plants take in light, water and carbon dioxide, and make sugar and
oxygen.
How many minutes are there in 3 days? There are 24 hours in a day and 60 minutes in an hour: 3 x 24 x 60 =
4320.

def fibonacci(n: int) -> int:
    if n < 2:
        return n
    return fibonacci(n - 1) + fibonacci(n - 2)

for i in range(10):
    print(i, fibonacci(i))
{"name": "demo", "values": [1, 2, 3], "nested": {"empty": null, "flag": true}}
Grüße aus München! Où est la bibliothèque? El niño comió una manzana. Привет, как дела? Всё хорошо, спасибо.
你好,世界!今天天气很好。我们去公园散步吧。你叫什么名字?我是一个语言模型。
こんにちは、お元気ですか。 안녕하세요. مرحبا بالعالم
Smile 🙂, laugh 😂, wave 👋🏽, and think 🤔.
"""


def write_demo_checkpoint(model_dir: str | Path, seed: int = 0) -> None:
    """Writes the whole directory, about 8 MB; the same bytes for the same seed.

    Raises CheckpointError where the directory has weights already, or where writing fails.
    """
    model_dir = Path(model_dir)
    ids = {text: _VOCAB_SIZE - len(_SPECIALS) + i for i, text in enumerate(_SPECIALS)}
    write_checkpoint(model_dir, _config(_VOCAB_SIZE, ids), seed=seed, max_file_bytes=_MAX_FILE_BYTES)
    write_tokenizer(model_dir, _VOCAB_SIZE, _CONTEXT_TOKENS)
    write_json(
        model_dir / GENERATION_FILE,
        {
            "bos_token_id": ids[ENDOFTEXT],
            "pad_token_id": ids[ENDOFTEXT],
            "eos_token_id": [ids[IM_END], ids[ENDOFTEXT]],
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "repetition_penalty": 1.05,
            "max_new_tokens": 64,
        },
    )


def write_tokenizer(model_dir: str | Path, vocab_size: int, context_tokens: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json in Qwen2's format, for any checkpoint with random weights.

    vocab_size: from _VOCAB_SIZE; what the training text does not fill are made words, which only decoding meets.
    """
    tokenizer = _train_tokenizer(vocab_size)
    ids = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    (Path(model_dir) / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(Path(model_dir) / "tokenizer_config.json", _tokenizer_config(ids, context_tokens))


def _config(vocab_size: int, ids: dict[str, int]) -> dict[str, Any]:
    """64 experts and top-8 as in Qwen2-57B-A14B, grouped key-value heads, all else small.

    initializer_range: 1 / sqrt(hidden_size). So logits of router and lm_head have deviation 1, and routing
    is neither uniform nor fixed.
    """
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": ids[ENDOFTEXT],
        "decoder_sparse_step": 1,
        "eos_token_id": ids[IM_END],
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.125,
        "intermediate_size": 128,
        "max_position_embeddings": _CONTEXT_TOKENS,
        "max_window_layers": 4,
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 32,
        "norm_topk_prob": False,
        "num_attention_heads": 4,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 128,
        "sliding_window": _CONTEXT_TOKENS,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }


def _train_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE built as Qwen2's, the special tokens last. Source: Qwen2's tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE - len(_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    if vocab_size > _VOCAB_SIZE:
        layout = json.loads(tokenizer.to_str())
        vocab = layout["model"]["vocab"]
        vocab |= {f"Ġword{i}": i for i in range(len(vocab), vocab_size - len(_SPECIALS))}
        tokenizer = Tokenizer.from_str(json.dumps(layout))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIALS])
    return tokenizer


def _tokenizer_config(ids: dict[str, int], context_tokens: int) -> dict[str, Any]:
    added = {
        str(token_id): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, token_id in ids.items()
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": context_tokens,
        "pad_token": ENDOFTEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
