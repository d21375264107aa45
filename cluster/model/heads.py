"""The layers above a decoder: one, or none. Attribute names are the checkpoint's. Knows no family."""

from cluster.config import ModelConfig
from cluster.model.layers.linear import Linear


def head_layers(config: ModelConfig) -> dict[str, Linear]:
    """The head's layer by its name; none where there is no head, or where it is the embeddings."""
    head, hidden = config.head, config.hidden_size
    match head.kind:
        case "none":
            return {}
        case "causal_lm":
            return {} if config.tie_word_embeddings else {"lm_head": Linear(hidden, {"lm_head": config.vocab_size})}
        case "question_answering":
            return {"qa_outputs": Linear(hidden, {"qa_outputs": len(head.labels)}, bias=head.has_bias)}
        case _:
            return {"score": Linear(hidden, {"score": len(head.labels)}, bias=head.has_bias)}
