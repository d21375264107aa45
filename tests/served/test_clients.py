"""Other programs' clients on the served application: the scripts of tests/clients/."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from client_tools import run, with_clients, with_npm, with_vllm

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc

pytestmark = pytest.mark.ray

SCRIPTS = Path(__file__).resolve().parents[1] / "clients"


@pytest.fixture
def arguments(served, channel):
    """Of each script: the server's address, the model, and the greedy text of the conversation's next twelve tokens
    over gRPC."""
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Which experts answered?")])
    params = pb.SamplingParams(temperature=0, repetition_penalty=1, max_tokens=12, ignore_eos=True)
    request = pb.GenerateRequest(chat=chat, sampling_params=params)
    text = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request).text
    return served.http_url, "demo-moe", text


@with_clients
@pytest.mark.parametrize("script", ["langchain_chat.py", "litellm_calls.py"])
def test_python_clients(arguments, script):
    run(os.environ["CLIENTS"], SCRIPTS / script, *arguments)


@with_npm
def test_openais_client_for_javascript(arguments):
    run("node", SCRIPTS / "chat.mjs", *arguments, OPENAI_NPM=f"{os.environ['OPENAI_NPM']}/")


@with_vllm
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "path"), [("openai", "completions"), ("openai-chat", "chat/completions")])
def test_vllms_bench_of_a_server(served, demo_checkpoint, tmp_path, backend, path):
    """Every request gets all its tokens, 20 of 16, as a stream; a chunk has several or, at an end, none."""
    run(
        os.environ["VLLM"], SCRIPTS / "vllm_bench.py", "--backend", backend, "--endpoint", f"/v1/{path}",
        "--base-url", served.http_url, "--model", "demo-moe", "--tokenizer", demo_checkpoint,
        "--dataset-name", "random", "--random-input-len", 32, "--random-output-len", 16, "--num-prompts", 20,
        "--max-concurrency", 4, "--ignore-eos", "--temperature", 0, "--disable-tqdm",
        "--save-result", "--save-detailed", "--result-dir", tmp_path, "--result-filename", "result.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["completed"], found["failed"]) == (20, 0)
    assert found["output_lens"] == [16] * 20
    assert all(ttft > 0 for ttft in found["ttfts"])
    assert all(0 < len(gaps) < 18 for gaps in found["itls"]), [len(gaps) for gaps in found["itls"]]


@with_clients
def test_lm_evals_numbers_are_those_of_transformers(served, demo_checkpoint, tmp_path):
    """Log-likelihoods of choices, and greedy answers to texts and to chats."""
    written = run(os.environ["CLIENTS"], SCRIPTS / "lm_eval_tasks.py", served.http_url, "demo-moe", tmp_path)
    found = json.loads(written.splitlines()[-1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32).eval()
    assert len(found["choices"]) == 4
    for choice in found["choices"]:
        ids = tokenizer(choice["context"] + choice["continuation"]).input_ids
        num_context = len(tokenizer(choice["context"]).input_ids)
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        each = logprobs[range(num_context - 1, len(ids) - 1), ids[num_context:]]
        assert choice["logprob"] == pytest.approx(float(each.sum()), abs=1e-3)
        best = logprobs[num_context - 1 : -1].argmax(-1).tolist()
        assert choice["greedy"] == (best == ids[num_context:])

    def continued(ids):
        new = model.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, repetition_penalty=1.0, eos_token_id=None
        )
        return tokenizer.decode(new[0, len(ids) :], skip_special_tokens=True).partition("\n")[0]

    for question, answer in found["completions"].items():
        assert answer.partition("\n")[0] == continued(tokenizer(question).input_ids)
    for question, answer in found["chats"].items():
        turn = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        assert answer.partition("\n")[0] == continued(ids)
