"""What generation_config.json says: sampling defaults and end-of-sequence ids. Its other keys are ignored."""

from pathlib import Path
from typing import Any

from cluster.checkpoint.reader import read_json_object
from cluster.config import ModelConfig
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


def read_sampling_defaults(model_dir: str | Path) -> SamplingParams:
    """The checkpoint's sampling parameters, filled up by SAMPLING_DEFAULTS; `max_tokens` may stay None.

    `do_sample: false` is temperature 0. A missing file or key and a null are no fault.
    Raises CheckpointError that names the file and the key for a value out of range.
    """
    path = Path(model_dir) / GENERATION_FILE
    raw = _read(path)
    params = SamplingParams()
    for key, field in _FIELD_OF_KEY.items():
        given: dict[str, Any] = {field: raw.get(key)}
        try:
            params = params.with_defaults(SamplingParams(**given))
        except InvalidRequest as error:
            raise CheckpointError(f"{path}: {key}{str(error).removeprefix(field)}") from error
    do_sample = raw.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise CheckpointError(f"{path}: do_sample is {do_sample!r}, true or false is needed")
    if do_sample is False:
        params = SamplingParams(temperature=0.0).with_defaults(params)
    return params.with_defaults(SAMPLING_DEFAULTS)


def read_eos_token_ids(model_dir: str | Path, config: ModelConfig) -> tuple[int, ...]:
    """Ids that end a sequence: generation_config.json's, then the config's that are not among them.

    Raises CheckpointError for an id that the vocabulary does not have: it could never end anything.
    """
    path = Path(model_dir) / GENERATION_FILE
    value = _read(path).get("eos_token_id")
    given = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in given:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < config.vocab_size:
            raise CheckpointError(
                f"{path}: eos_token_id has {token_id!r}, ids from 0 to {config.vocab_size - 1} are needed"
            )
    return tuple(dict.fromkeys((*given, *config.eos_token_ids)))


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}
