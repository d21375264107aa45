"""Reads a checkpoint's sampling defaults, and the ids that end an answer. Ignores all other keys."""

from pathlib import Path
from typing import Any

from cluster.checkpoint.files import is_there, read_json_object
from cluster.checkpoint.tokenizer_files import TokenId, find_eos
from cluster.config import ModelConfig
from cluster.config.json_keys import shown
from cluster.errors import CheckpointError, InvalidRequest
from cluster.types import SAMPLING_DEFAULTS, SamplingParams

GENERATION_FILE = "generation_config.json"

_FIELD_OF_KEY = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_WHOLE = ("top_k", "max_new_tokens")


def read_sampling_defaults(model_dir: str | Path) -> SamplingParams:
    """The checkpoint's sampling parameters, filled up by SAMPLING_DEFAULTS; `max_tokens` may stay None.

    `do_sample: false` means temperature 0; `top_k: -1` keeps all tokens, as in vLLM; 20.0 means 20. A missing file or
    key and a null are allowed. Raises CheckpointError that names the file and the key for a value out of range.
    """
    path = Path(model_dir) / GENERATION_FILE
    raw = _read(path)
    params = SamplingParams()
    for key, field in _FIELD_OF_KEY.items():
        given: dict[str, Any] = {field: _number(key, raw.get(key))}
        try:
            params = params.with_defaults(SamplingParams(**given))
        except InvalidRequest as error:
            raise CheckpointError(f"{path}: {key}{str(error).removeprefix(field)}") from error
    do_sample = raw.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise CheckpointError(f"{path}: do_sample is {shown(do_sample)}, true or false is needed")
    if do_sample is False:
        params = SamplingParams(temperature=0.0).with_defaults(params)
    return params.with_defaults(SAMPLING_DEFAULTS)


def read_eos_token_ids(model_dir: str | Path, config: ModelConfig) -> tuple[int, ...]:
    """Ids that end a sequence, each once, in the order of `find_end_ids`.

    Raises CheckpointError for an id that the vocabulary does not have: it could never end anything.
    """
    found = find_end_ids(model_dir, config)
    for end in found:
        if end.token_id >= config.vocab_size:
            raise CheckpointError(
                f"{end.origin} has {shown(end.token_id)}, ids from 0 to {config.vocab_size - 1} are needed"
            )
    return tuple(dict.fromkeys(end.token_id for end in found))


def find_end_ids(model_dir: str | Path, config: ModelConfig) -> list[TokenId]:
    """Ids that shall end a sequence: generation_config.json's, config.json's, and the tokenizer's own, as in vLLM.

    Raises CheckpointError for a value that is no id.
    """
    model_dir = Path(model_dir)
    path = model_dir / GENERATION_FILE
    value = _read(path).get("eos_token_id")
    given = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in given:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise CheckpointError(
                f"{path}: eos_token_id has {shown(token_id)}, ids from 0 to {config.vocab_size - 1} are needed"
            )
    found = [TokenId(token_id, f"{path}: eos_token_id") for token_id in given]
    found += [TokenId(token_id, f"{model_dir / 'config.json'}: eos_token_id") for token_id in config.eos_token_ids]
    eos = find_eos(model_dir)
    return found if eos is None else [*found, eos]


def _number(key: str, value: Any) -> Any:
    if key in _WHOLE and isinstance(value, float) and value.is_integer():
        value = int(value)
    return 0 if key == "top_k" and value == -1 else value


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if is_there(path) else {}
