"""`/tokenizer_info`: the special tokens and the chat template, as transformers reads them."""

import asyncio

import transformers
from http_tools import Front
from serving_fakes import write_tokenizer

from cluster.serving.text.tokenizer import Tokenizer


def test_special_tokens_and_template_are_those_of_transformers(tmp_path):
    model_dir = write_tokenizer(tmp_path, eos_token="<|im_end|>", tokenizer_class="Qwen2Tokenizer")
    found = asyncio.run(Front(Tokenizer(model_dir)).get("/tokenizer_info")).json()
    expected = transformers.AutoTokenizer.from_pretrained(model_dir)
    assert found["eos_token"] == expected.eos_token
    assert found["pad_token"] == expected.pad_token
    assert found["bos_token"] == expected.bos_token
    assert found["chat_template"] == expected.chat_template


def test_a_server_without_a_tokenizer_has_none():
    answer = asyncio.run(Front(None).get("/tokenizer_info"))
    assert answer.status_code == 404
    assert "left out the tokenizer" in answer.json()["error"]["message"]
