"""Trains the demo's model and writes it:   python deploy/demo/train.py [OUT]

A Qwen2-MoE of two million parameters learns the answers of questions/ from nothing, on two cores in less than half an
hour. The same seed gives the same model on the same machine. It needs the extra `test` (transformers) and rich.

Beside the language model's loss each sparse layer has one of its own, the mutual information of topic and expert: it
grows when all experts are used and each keeps to few topics. Source: Bridle et al., "Unsupervised classifiers, mutual
information and phantom targets", 1991.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from batches import SYSTEM_MESSAGES, Batch, Conversations
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from texts import expanded, read_pairs
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import Linear
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from cluster.checkpoint.made.synthetic import write_json
from cluster.checkpoint.made.tokenizer import ENDOFTEXT, IM_END, write_trained_tokenizer

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parents[1] / "cluster" / "checkpoint" / "shipped" / "demo"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception("role '" ~ message['role'] ~ "' is unknown: use system, user, assistant or tool") -}}
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
VOCAB_SIZE = 1536
CONTEXT_TOKENS = 2048
CHOOSER_WEIGHT = 0.5  # of the loss, for naming the pair before its answer begins
TOP_K = 4
SOFTNESS = 3.0  # divides the logits for the gradient of the choice: those of its last experts count, too
MUTUAL_WEIGHT = 1.0  # of the loss, for the mutual information of topic and expert
PEAK_LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 3e-3, 60, 0.05


def chosen_experts(logits: Tensor) -> Tensor:
    """Each token's experts, 1 / k each: [T, E], of a router's logits. Its gradient is that of the soft choice."""
    soft = (logits / SOFTNESS).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, logits.topk(TOP_K, -1).indices, 1 / TOP_K)
    return soft + (hard - soft).detach()


def mutual_information(probs: Tensor, topics: Tensor, num_topics: int) -> Tensor:
    """Of topic and expert in nats. probs: [T, E].  topics: [T], from 0."""
    shares = F.one_hot(topics, num_topics).to(probs.dtype)  # [T, topics]
    weights = shares.mean(0)
    by_topic = (shares.T @ probs) / shares.sum(0).clamp(min=1)[:, None]  # [topics, E]
    return _entropy(probs.mean(0)) - (weights * _entropy(by_topic)).sum()


def _entropy(probs: Tensor) -> Tensor:
    return -(probs * probs.clamp(min=1e-3).log()).sum(-1)


def make_model(vocab_size: int, end_id: int, pad_id: int) -> Qwen2MoeForCausalLM:
    config = Qwen2MoeConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=64,
        initializer_range=0.06,
        num_experts=64,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )
    model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # a fifth faster here than a loop over the experts
    return model


def losses(model: Qwen2MoeForCausalLM, chooser: Linear, batch: Batch, num_topics: int) -> Tensor:
    """[3]: the language model's, that of the chosen pairs, and the mutual information, a mean over the layers."""
    out = model(batch.ids, output_router_logits=True, output_hidden_states=True, use_cache=False)
    each = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    begins = batch.pairs >= 0
    chosen = F.cross_entropy(chooser(out.hidden_states[-1][begins]), batch.pairs[begins])
    known = batch.topics.flatten() >= 0
    topics = batch.topics.flatten()[known]
    mutual = [mutual_information(chosen_experts(logits[known]), topics, num_topics) for logits in out.router_logits]
    return torch.stack(((each * weights).sum() / weights.sum(), chosen, torch.stack(mutual).mean()))


def rate(step: int, num_steps: int) -> float:
    """The share of the peak learning rate: it rises for WARMUP_STEPS, stays, and falls over the last third."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.01, 3 * (num_steps - step) / num_steps))


class Training:
    """A model, its optimizer and its conversations, which can be kept in a file and go on from there."""

    def __init__(self, model: Qwen2MoeForCausalLM, conversations: Conversations) -> None:
        self.model, self.conversations, self.step = model, conversations, 0
        self.chooser = Linear(model.config.hidden_size, conversations.num_pairs)  # not shipped
        self._parameters = [*model.parameters(), *self.chooser.parameters()]
        groups = [
            {"params": [p for p in self._parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self._parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    def keep(self, path: Path) -> None:
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "chooser": self.chooser.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.conversations.rng.getstate(),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def go_on_from(self, path: Path) -> None:
        state = torch.load(path, weights_only=False)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.chooser.load_state_dict(state["chooser"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.conversations.rng.setstate(state["random"])

    def run_step(self, num_steps: int) -> Tensor:
        """Returns `losses` before the step: [3]."""
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * rate(self.step, num_steps)
        batch = self.conversations.batch(short=self.step % 2 == 1)
        found = losses(self.model, self.chooser, batch, len(self.conversations.topics))
        loss, chosen, mutual = found
        self.optimizer.zero_grad()
        (loss + CHOOSER_WEIGHT * chosen - MUTUAL_WEIGHT * mutual).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        return found.detach()


def train(training: Training, num_steps: int, kept: Path | None) -> None:
    """Until num_steps are done, with a line of progress. kept: written every 100 steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=num_steps, completed=training.step)
        late: Tensor | None = None
        while training.step < num_steps:
            new = training.run_step(num_steps)
            late = new if late is None else 0.95 * late + 0.05 * new
            losses_shown = f"loss {late[0]:.3f}  choice {late[1]:.3f}  mutual information {late[2]:.2f}"
            shown = f"step {training.step}/{num_steps}  {losses_shown}"
            progress.update(task, advance=1, description=shown)
            if training.step % 50 == 0 and not progress.console.is_terminal:
                print(shown, flush=True)
            if training.step % 100 == 0 and kept is not None:
                training.keep(kept)


def write_model(out: Path, model: Qwen2MoeForCausalLM, end_ids: list[int]) -> None:
    """Writes the published layout: bfloat16, an expert's matrices each with a name of their own."""
    model.to(torch.bfloat16).save_pretrained(out)
    write_json(
        out / "generation_config.json",
        {"do_sample": False, "eos_token_id": end_ids, "pad_token_id": end_ids[-1], "max_new_tokens": 128},
    )
    shutil.copy(HERE / "README.md", out / "README.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=SHIPPED, help="directory (default: the shipped one)")
    parser.add_argument("--steps", type=int, default=2100, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--kept", type=Path, metavar="FILE", help="keeps the training, which goes on from there")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pairs = read_pairs()
    args.out.mkdir(parents=True, exist_ok=True)
    texts = [text for pair in pairs for wording in pair.wordings for text in expanded(wording)[:40]]
    texts += [pair.answer for pair in pairs for _ in range(3)] + list(SYSTEM_MESSAGES)
    texts += ["system\n", "user\n", "assistant\n"] * 100  # a token each
    vocab_size = write_trained_tokenizer(args.out, texts, VOCAB_SIZE, CHAT_TEMPLATE, CONTEXT_TOKENS)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    end, pad = tokenizer.token_to_id(IM_END), tokenizer.token_to_id(ENDOFTEXT)
    model = make_model(vocab_size, end, pad)
    numbers = {"pairs": len(pairs), "vocabulary": vocab_size, "parameters": model.num_parameters()}
    print(json.dumps(numbers), flush=True)
    conversations = Conversations(pairs, lambda text: tokenizer.encode(text).ids, args.seed)
    training = Training(model, conversations)
    if args.kept is not None and args.kept.exists():
        training.go_on_from(args.kept)
    train(training, args.steps, args.kept)
    write_model(args.out, model, [end, pad])


if __name__ == "__main__":
    main()
