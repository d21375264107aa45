"""lm-eval on the served model, with two tasks of its own. Run by test_clients.py as `python FILE URL MODEL FOLDER`.

FOLDER: where the tasks and their documents are written. Prints a JSON object: of each choice its context, its
continuation and its log-likelihood; the answers of completions and of chats.
"""

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

URL, MODEL, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
DOCUMENTS = [
    {"question": "A shard holds", "answers": ["experts and nothing else", "água, 专家 and tea"], "right": 0},
    {"question": "The router chose four of sixty experts, and they", "answers": ["answered", "slept"], "right": 0},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
UNTIL = 'generation_kwargs: {until: ["\\n"], max_gen_toks: 8, ignore_eos: true, repetition_penalty: 1.0}\n'


def write_tasks() -> TaskManager:
    documents = FOLDER / "documents.jsonl"
    documents.write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    for name, output_type, metric in (
        ("choosing", "multiple_choice", "acc"),
        ("saying", "generate_until", "exact_match"),
    ):
        text = TASK.format(name=name, documents=documents, output_type=output_type, metric=metric)
        (FOLDER / f"{name}.yaml").write_text(text + (UNTIL if name == "saying" else ""))
    return TaskManager(include_path=str(FOLDER), include_defaults=False)


def samples(model: str, path: str, tasks: list[str], **options: object) -> dict[str, list[dict]]:
    arguments = {"model": MODEL, "base_url": f"{URL}{path}", "num_concurrent": 4, "max_length": 512}
    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=tasks,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )
    return found["samples"]


manager = write_tasks()
completions = samples("local-completions", "/v1/completions", ["choosing", "saying"])
chats = samples("local-chat-completions", "/v1/chat/completions", ["saying"], apply_chat_template=True)
choices = [
    {"context": context, "continuation": continuation, "logprob": float(logprob), "greedy": greedy in (True, "True")}
    for sample in completions["choosing"]
    for (context, continuation), [(logprob, greedy)] in zip(
        [arguments[:2] for arguments in sample["arguments"]], sample["resps"], strict=True
    )
]
answers = {
    kind: {sample["doc"]["question"]: sample["resps"][0][0] for sample in found["saying"]}
    for kind, found in (("completions", completions), ("chats", chats))
}
sys.stdout.write(json.dumps({"choices": choices, **answers}) + "\n")
