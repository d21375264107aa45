"""The checkpoint to measure with: the user's, or one with random weights that is made once and kept."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import Progress

from cluster.bench.stored_forms import STORED
from cluster.checkpoint.made.demo import write_demo_checkpoint
from cluster.checkpoint.made.drawn import SEED_KEY
from cluster.checkpoint.made.published import SHAPES
from cluster.checkpoint.made.synthetic import write_checkpoint, write_json
from cluster.checkpoint.made.tokenizer import write_tokenizer
from cluster.checkpoint.reader import CONFIG_FILE, read_json_object
from cluster.config import ModelConfig, read_model_config
from cluster.config.stored import KEY
from cluster.errors import SetupError

_SEED = 0


def default_directory(environ: dict[str, str]) -> Path:
    """Where made checkpoints are kept: the user's cache."""
    cache = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "moe-cluster" / "checkpoints"


def read_config(model_dir: Path) -> ModelConfig:
    """Raises CheckpointError for a directory that is no checkpoint."""
    return read_model_config(read_json_object(model_dir / "config.json"))


def describe(config: ModelConfig, dtype: str) -> str:
    """One line with the shapes that decide the speed."""
    experts = f"dense of {config.intermediate_size}"
    if config.moe is not None:
        experts = (
            f"{config.moe.num_experts} experts of {config.moe.moe_intermediate_size}, "
            f"top-{config.moe.num_experts_per_tok}, shared expert of {config.moe.shared_expert_intermediate_size}"
        )
    return (
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {experts}, vocabulary {config.vocab_size}, "
        f"{dtype}"
    )


def made_checkpoint(
    shapes: str,
    num_layers: int | None,
    directory: Path,
    progress: Callable[[int, int], None],
    *,
    with_files: bool = True,
) -> Path:
    """Returns a checkpoint with random weights, and makes it unless an earlier call has.

    shapes: "demo", or one of SHAPES.  num_layers: not for the demo; None as `layers_of` says.
    progress: called with bytes made and bytes in all.
    with_files: False writes no weights, and the process that loads it draws them on its device; not for the demo.
    A directory under its final name is complete; its name has a digest of its configuration and seed.
    Raises SetupError where it cannot be written.
    """
    if shapes == "demo":
        return _made(directory / "demo", lambda path: write_demo_checkpoint(path, seed=_SEED))
    num_layers = layers_of(shapes) if num_layers is None else num_layers
    if num_layers < 1:
        raise SetupError(f"--layers is {num_layers}, at least 1 is needed")
    raw_config: dict[str, Any] = {**SHAPES[shapes], "num_hidden_layers": num_layers}
    if not with_files:
        raw_config[SEED_KEY] = _SEED
    digest = hashlib.sha256(json.dumps([raw_config, _SEED, "tokenizer"], sort_keys=True).encode()).hexdigest()[:8]

    def write(path: Path) -> None:
        if with_files:
            write_checkpoint(path, raw_config, seed=_SEED, progress=progress)
        else:
            path.mkdir(parents=True)
            write_json(path / CONFIG_FILE, raw_config)
        write_tokenizer(path, raw_config["vocab_size"], raw_config["max_position_embeddings"])

    return _made(directory / f"{shapes}-{num_layers}-layers-{digest}", write)


def stored_checkpoint(model_dir: Path, form: str, directory: Path | None) -> Path:
    """A checkpoint with the shapes of another and random numbers in a form of STORED; its tensors are drawn.

    directory: as of `made_with_progress`. Raises SetupError where it cannot be written, CheckpointError.
    """
    raw_config = {**read_json_object(model_dir / CONFIG_FILE), KEY: STORED[form], SEED_KEY: _SEED}
    read_model_config(raw_config)
    digest = hashlib.sha256(json.dumps(raw_config, sort_keys=True).encode()).hexdigest()[:8]

    def write(path: Path) -> None:
        path.mkdir(parents=True)
        write_json(path / CONFIG_FILE, raw_config)

    return _made((directory or default_directory(dict(os.environ))) / f"{form}-{digest}", write)


def layers_of(shapes: str) -> int:
    """Layers of a made checkpoint unless another number is asked for: all of a dense one, 4 of the large MoE ones."""
    raw_config = SHAPES.get(shapes, {})
    return int(raw_config["num_hidden_layers"]) if raw_config.get("model_type") == "qwen2" else 4


def made_with_progress(
    shapes: str, num_layers: int | None, directory: Path | None, progress: Progress, *, with_files: bool = True
) -> Path:
    """As `made_checkpoint`, shown on `progress`. directory: None is the user's cache."""
    shown = "" if shapes == "demo" else f", {layers_of(shapes) if num_layers is None else num_layers} layers"
    task = progress.add_task(f"checkpoint {shapes}{shown}", total=None)
    model_dir = made_checkpoint(
        shapes,
        num_layers,
        directory or default_directory(dict(os.environ)),
        lambda made, total: progress.update(task, completed=made, total=total),
        with_files=with_files,
    )
    progress.update(task, completed=1, total=1)
    return model_dir


def _made(final: Path, write: Callable[[Path], None]) -> Path:
    if final.exists():
        return final
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, final)
    except OSError as error:
        raise SetupError(f"{final} cannot be written ({error}): choose another --checkpoint-dir") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final
