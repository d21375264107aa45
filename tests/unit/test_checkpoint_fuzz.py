"""Whatever bytes stand in a checkpoint's directory: it is served, or refused in one line by a CheckpointError.

Each file of the demo checkpoint is cut, flipped, replaced and filled with random JSON. `check_checkpoint` is what
`serve`, `demo`, `plan` and `LLM` call first; what it lets through, a model is loaded from in the slow runs.
"""

import json
import os
import resource
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import LLM, SamplingParams
from cluster.checkpoint.made.demo import write_demo_checkpoint
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.cli import main
from cluster.config import EngineConfig
from cluster.engine.preflight import check_checkpoint
from cluster.errors import ClusterError, SetupError

ADDRESS_SPACE = 6 << 30  # beside what is mapped already: a huge allocation is a MemoryError, which no test lets pass

huge = st.sampled_from([0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**63, 10**9, 10**12, 10**30, 10**400, -(2**63)])
odd_floats = st.sampled_from([0.5, 1.0, 20.0, 1e300, 1e-320, float("nan"), float("inf"), float("-inf"), -0.0])
odd_texts = st.sampled_from(
    ["", "yarn", "bf16", "\ud800", "a\nb", "\0", "<|im_end|>", "torch.float16", "../x", "x" * 9999]
)
scalars = st.none() | st.booleans() | huge | odd_floats | odd_texts | st.integers() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "rope_type", "factor", "content", "id", "special", "name", "template", "1023", "x"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)

DEFAULT = settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
DEEP = settings(DEFAULT, max_examples=400)
CONFIG_KEYS = (
    "model_type", "hidden_act", "quantization_config", "vocab_size", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "moe_intermediate_size",
    "shared_expert_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step",
    "mlp_only_layers", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "original_max_position_embeddings", "qkv_bias", "use_sliding_window", "sliding_window", "max_window_layers",
    "layer_types", "tie_word_embeddings", "max_position_embeddings", "torch_dtype", "dtype", "eos_token_id",
)  # fmt: skip
GENERATION_KEYS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "do_sample", "eos_token_id",
)  # fmt: skip
TOKENIZER_CONFIG_KEYS = (
    "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "bos_token", "eos_token", "pad_token",
    "unk_token", "chat_template", "add_prefix_space", "model_max_length",
)  # fmt: skip
TOKENIZER_KEYS = (
    "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder",
    "model", "model.vocab", "model.merges", "model.type", "model.dropout", "model.unk_token", "model.byte_fallback",
)  # fmt: skip
KEYS = {
    "config.json": CONFIG_KEYS,
    "generation_config.json": GENERATION_KEYS,
    "tokenizer_config.json": TOKENIZER_CONFIG_KEYS,
    "tokenizer.json": TOKENIZER_KEYS,
    "model.safetensors.index.json": ("weight_map", "metadata"),
}
WEIGHTS = "model-00001-of-00003.safetensors"
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")
FILES = (*KEYS, *TEMPLATES, WEIGHTS)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's, with fewer tensors, so that a check takes less: in three files."""
    model_dir = tmp_path_factory.mktemp("fuzz") / "model"
    write_demo_checkpoint(model_dir)
    for path in (*model_dir.glob("*.safetensors"), model_dir / "model.safetensors.index.json"):
        path.unlink()
    raw = json.loads((model_dir / "config.json").read_text()) | {"num_hidden_layers": 2, "num_experts": 16}
    write_checkpoint(model_dir, raw, seed=0, max_file_bytes=600_000)
    template = json.loads((model_dir / "tokenizer_config.json").read_text())["chat_template"]
    for name in TEMPLATES:
        (model_dir / name).parent.mkdir(exist_ok=True)
        (model_dir / name).write_text(template)
    return model_dir


@pytest.fixture(scope="module")
def model_dir(pristine: Path) -> Path:
    """Links to the pristine files, but for the one that a test replaces and puts back."""
    return linked(pristine, pristine.parent / "changed")


def linked(origin: Path, copy: Path) -> Path:
    """A copy with folders of its own and a link for each file."""
    return Path(shutil.copytree(origin, copy, copy_function=lambda path, link: Path(link).symlink_to(path)))


@contextmanager
def replaced(model_dir: Path, file_name: str, content: bytes | None = None) -> Iterator[Path]:
    """The file with other bytes; without any, no file."""
    path = model_dir / file_name
    target = os.readlink(path)
    path.unlink()
    try:
        if content is not None:
            path.write_bytes(content)
        yield path
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(target)


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def check(model_dir: Path, *, tokenizer: bool = True) -> bool:
    """Whether the checkpoint is accepted. Anything but a SetupError in one line fails the test."""
    try:
        check_checkpoint(model_dir, EngineConfig(kv_cache_bytes=1 << 40), 2, tokenizer=tokenizer)
    except SetupError as error:
        message = str(error)
        assert message.isprintable(), ascii(message)
        assert len(message) < 2000
        return False
    return True


def with_value(pristine: Path, file_name: str, key: str, value: Any) -> bytes:
    raw = json.loads((pristine / file_name).read_text())
    *outer, last = key.split(".")
    inner = raw
    for name in outer:
        inner = inner[name]
    inner[last] = value
    return json.dumps(raw).encode()


def check_any_value(pristine: Path, model_dir: Path, file_name: str) -> None:
    @given(st.sampled_from(KEYS[file_name]), values)
    def run(key: str, value: Any) -> None:
        with replaced(model_dir, file_name, with_value(pristine, file_name, key, value)):
            check(model_dir, tokenizer="tokenizer" in file_name)

    return run


@pytest.mark.parametrize("file_name", KEYS)
def test_any_value_for_any_key_is_read_or_refused(pristine: Path, model_dir: Path, file_name: str) -> None:
    DEFAULT(check_any_value(pristine, model_dir, file_name))()


@pytest.mark.slow
@pytest.mark.parametrize("file_name", KEYS)
def test_many_more_values_are_read_or_refused(pristine: Path, model_dir: Path, file_name: str) -> None:
    DEEP(check_any_value(pristine, model_dir, file_name))()


def damages(data: bytes) -> st.SearchStrategy[bytes]:
    """Cut, flipped, doubled, random; most of it near the beginning, where a header is."""
    places = st.integers(0, min(len(data) - 1, 4000)) | st.integers(0, len(data) - 1)
    flips = st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=4)
    cuts = places.map(lambda end: data[:end])
    holes = st.tuples(places, st.binary(max_size=12)).map(lambda hole: data[: hole[0]] + hole[1] + data[hole[0] :])
    return cuts | flips.map(lambda pairs: _flipped(data, pairs)) | holes | st.binary(max_size=200)


def _flipped(data: bytes, pairs: list[tuple[int, int]]) -> bytes:
    out = bytearray(data)
    for place, bits in pairs:
        out[place] ^= bits
    return bytes(out)


def check_any_bytes(pristine: Path, model_dir: Path, file_name: str) -> Callable[[], None]:
    data = (pristine / file_name).read_bytes()

    @given(damages(data))
    def run(content: bytes) -> None:
        with replaced(model_dir, file_name, content):
            check(model_dir, tokenizer="token" in file_name or "template" in file_name)

    return run


@pytest.mark.parametrize("file_name", FILES)
def test_any_bytes_are_read_or_refused(pristine: Path, model_dir: Path, file_name: str) -> None:
    settings(DEFAULT, max_examples=25)(check_any_bytes(pristine, model_dir, file_name))()


@pytest.mark.slow
@pytest.mark.parametrize("file_name", FILES)
def test_many_more_bytes_are_read_or_refused(pristine: Path, model_dir: Path, file_name: str) -> None:
    DEEP(check_any_bytes(pristine, model_dir, file_name))()


headers = st.dictionaries(
    st.sampled_from(["lm_head.weight", "model.norm.weight", "__metadata__", "x\ny"]),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "BF16", "F8_E5M2", "I64", "F128", ""]) | scalars,
            "shape": st.lists(huge, max_size=3) | scalars,
            "data_offsets": st.lists(huge, max_size=3) | scalars,
        },
    )
    | scalars,
    max_size=3,
)


@settings(DEFAULT, max_examples=40)
@given(headers, huge, st.binary(max_size=64))
def test_any_header_is_read_or_refused(model_dir: Path, header: Any, length: int, body: bytes) -> None:
    text = json.dumps(header).encode()
    size = length % 2**64 if length > 3 else len(text)
    with replaced(model_dir, WEIGHTS, struct.pack("<Q", size) + text + body):
        assert not check(model_dir, tokenizer=False)


def _directory(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "blobs" / "0123")


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _deep(path: Path) -> None:
    path.write_text("[" * 100_000 + "]" * 100_000)


def _deep_objects(path: Path) -> None:
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def _nearly_too_deep(path: Path) -> None:
    path.write_text('{"eos_token_id":' * 900 + "1" + "}" * 900)


def _latin(path: Path) -> None:
    path.write_bytes(b'{"eos_token": "\xe9"}')


def _long_number(path: Path) -> None:
    path.write_text('{"eos_token_id": ' + "9" * 100_000 + "}")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


ODD = [
    _directory, _loop, _nowhere, _endless, _pipe, _lfs, _empty, _deep, _deep_objects, _nearly_too_deep, _latin,
    _long_number, _sparse,
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("file_name", FILES)
def test_what_is_no_file_of_its_kind_is_refused_by_name(
    model_dir: Path, file_name: str, odd: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """By `plan` too, with exit code 2. A template may be anything that is text, also nothing."""
    with replaced(model_dir, file_name) as path:
        odd(path)
        accepted = check(model_dir)
        text = file_name in TEMPLATES and odd in (
            _empty,
            _deep,
            _deep_objects,
            _nearly_too_deep,
            _long_number,
        )
        # JSON that lacks nothing but what generation and the tokenizer can do without
        optional = file_name in ("generation_config.json", "tokenizer_config.json") and odd is _nearly_too_deep
        if not text and not (optional and accepted):
            assert not accepted
            assert main(["plan", str(model_dir)]) == 2
            printed = capsys.readouterr()
            with pytest.raises(SetupError) as caught:
                LLM(model_dir, device="cpu")
            assert printed.err == f"moe-cluster: {caught.value}\n"
            assert file_name in printed.err
            assert printed.err.startswith("moe-cluster: ")
            assert printed.err.count("\n") == 1


@pytest.fixture
def readable_by_others(pristine: Path) -> Iterator[Path]:
    """A copy where a user who is not root could look, were it not for what a test takes away."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield Path(shutil.copytree(pristine, folder / "model"))
    shutil.rmtree(folder)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", [*FILES, "."])
def test_what_may_not_be_read_is_refused_by_name(readable_by_others: Path, name: str) -> None:
    with as_nobody():
        assert check(readable_by_others)
    (readable_by_others / name).chmod(0)
    with as_nobody(), pytest.raises(SetupError, match=r"cannot be read: Permission denied") as caught:
        check_checkpoint(readable_by_others, EngineConfig(), 2)
    assert str(readable_by_others / name) in str(caught.value)


def test_a_directory_behind_a_closed_one_is_refused(readable_by_others: Path) -> None:
    readable_by_others.parent.chmod(0)
    with as_nobody(), pytest.raises(SetupError, match="model cannot be read: Permission denied"):
        check_checkpoint(readable_by_others, EngineConfig(), 2)


@pytest.fixture(scope="module")
def vocabulary_dir(pristine: Path) -> Path:
    """The same tokenizer as the files that tokenizer.json was made from."""
    copy = pristine.parent / "vocabulary"
    origin = Path(shutil.copytree(pristine, pristine.parent / "vocabulary-origin"))
    raw = json.loads((origin / "tokenizer.json").read_text())
    (origin / "tokenizer.json").unlink()
    (origin / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (origin / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in raw["model"]["merges"]))
    (origin / "added_tokens.json").write_text(json.dumps({t["content"]: t["id"] for t in raw["added_tokens"]}))
    (origin / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    (origin / "tokenizer_config.json").write_text("{}")
    return linked(origin, copy)


@pytest.mark.parametrize("file_name", ["vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"])
def test_any_bytes_of_a_vocabulary_are_read_or_refused(vocabulary_dir: Path, file_name: str) -> None:
    assert check(vocabulary_dir)
    origin = vocabulary_dir.parent / "vocabulary-origin"
    settings(DEFAULT, max_examples=20)(check_any_bytes(origin, vocabulary_dir, file_name))()


@DEFAULT
@given(
    st.sampled_from(["added_tokens.json", "special_tokens_map.json"]),
    st.dictionaries(st.sampled_from(["eos_token", "additional_special_tokens", "<|im_end|>", "\ud800", ""]), values),
)
def test_any_names_of_tokens_are_read_or_refused(vocabulary_dir: Path, file_name: str, names: dict[str, Any]) -> None:
    with replaced(vocabulary_dir, file_name, json.dumps(names).encode()):
        check(vocabulary_dir)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**12),
        ("num_experts", 10**9),
        ("hidden_size", 2**31 - 2),
        ("moe_intermediate_size", 10**18),
        ("layer_types", ["full_attention"] * 100_000),
        ("max_position_embeddings", 10**15),
    ],
)
def test_huge_numbers_are_refused_by_every_way_in(
    pristine: Path, model_dir: Path, key: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with replaced(model_dir, "config.json", with_value(pristine, "config.json", key, value)):
        assert main(["plan", str(model_dir)]) == 2
        assert main(["serve", str(model_dir), "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]) == 2
        assert capsys.readouterr().err.count("moe-cluster: ") == 2
        with pytest.raises(SetupError, match="config"):
            LLM(model_dir, device="cpu")


@pytest.mark.parametrize("odd", [_lfs, _deep, _directory, _nowhere])
def test_serve_refuses_before_it_starts_ray(
    model_dir: Path, odd: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cases that took Ray and a minute: a shard that is a pointer, top_k -2, an eos outside the vocabulary."""

    def start_ray(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("cluster.runtime.start.served.start_ray", start_ray)
    for file_name in FILES:
        with replaced(model_dir, file_name) as path:
            odd(path)
            if file_name in TEMPLATES and odd is _deep:
                continue
            assert main(["serve", str(model_dir), "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]) == 2
            error = capsys.readouterr().err
            assert file_name in error
            assert error.count("\n") == 1, error
    for key, value in (("top_k", -2), ("eos_token_id", 151643)):
        content = with_value(model_dir, "generation_config.json", key, value)
        with replaced(model_dir, "generation_config.json", content):
            assert main(["serve", str(model_dir), "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]) == 2
            assert key in capsys.readouterr().err


@pytest.mark.slow
@settings(DEFAULT, max_examples=150)
@given(
    st.sampled_from([(name, key) for name in ("config.json", "generation_config.json") for key in KEYS[name]]), values
)
def test_what_is_accepted_also_answers(pristine: Path, model_dir: Path, place: tuple[str, str], value: Any) -> None:
    file_name, key = place
    with replaced(model_dir, file_name, with_value(pristine, file_name, key, value)):
        if not check(model_dir):
            return
        # Logits that are infinite, or a prompt that is longer than the context, are the request's own fault.
        with suppress(ClusterError), LLM(model_dir, device="cpu", kv_cache_bytes=1 << 20, max_num_seqs=2) as llm:
            llm.generate(["hi"], SamplingParams(max_tokens=2))


def test_the_pristine_checkpoint_is_accepted(pristine: Path, model_dir: Path, tmp_path: Path) -> None:
    assert check(pristine)
    assert check(model_dir)
    assert check(Path(shutil.copytree(pristine, tmp_path / "with ö and spaces")))
