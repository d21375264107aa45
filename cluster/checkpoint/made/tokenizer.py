"""Makes a tokenizer and a chat template in Qwen2's format, for checkpoints that are made here."""

import json
from collections.abc import Iterable
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

from cluster.checkpoint.made.synthetic import write_json
from cluster.checkpoint.tokenizer_files import QWEN2_PRETOKENIZE

ENDOFTEXT, IM_START, IM_END = SPECIALS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception("role '" ~ message['role'] ~ "' is unknown: use system, user, assistant or tool") -}}
    {%- endif -%}
    {%- if message['role'] == 'system' and not loop.first -%}
        {{- raise_exception('a system message must be the first one') -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] -}}
    {%- for call in message['tool_calls'] or [] -%}
        {{- '\\n<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

VOCAB_SIZE = 1024  # three of them special
# The tokenizer is trained on it: prose, chat, code, and scripts whose characters take several bytes.
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


def write_tokenizer(model_dir: str | Path, vocab_size: int, context_tokens: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json in Qwen2's format, for any checkpoint with random weights.

    vocab_size: from VOCAB_SIZE. Made words, which only decoding meets, fill what the training text leaves.
    """
    tokenizer = _train([_TEXT], VOCAB_SIZE)
    if vocab_size > VOCAB_SIZE:
        layout = json.loads(tokenizer.to_str())
        vocab = layout["model"]["vocab"]
        vocab |= {f"Ġword{i}": i for i in range(len(vocab), vocab_size - len(SPECIALS))}
        tokenizer = Tokenizer.from_str(json.dumps(layout))
    _write(model_dir, tokenizer, CHAT_TEMPLATE, context_tokens)


def write_trained_tokenizer(
    model_dir: str | Path, texts: Iterable[str], vocab_size: int, chat_template: str, context_tokens: int
) -> int:
    """Writes the same files for a vocabulary that is trained on the texts. Returns its size, vocab_size at most."""
    return _write(model_dir, _train(texts, vocab_size), chat_template, context_tokens)


def _write(model_dir: str | Path, tokenizer: Tokenizer, chat_template: str, context_tokens: int) -> int:
    """Adds the special tokens, the last of the vocabulary, whose size it returns."""
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    ids = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    (Path(model_dir) / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(Path(model_dir) / "tokenizer_config.json", _tokenizer_config(ids, chat_template, context_tokens))
    return int(tokenizer.get_vocab_size())


def _train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE built as Qwen2's, without the special tokens, for which vocab_size has room.

    Source: Qwen2's tokenizer.json.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _tokenizer_config(ids: dict[str, int], chat_template: str, context_tokens: int) -> dict[str, Any]:
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
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": context_tokens,
        "pad_token": ENDOFTEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
