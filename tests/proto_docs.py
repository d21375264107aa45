"""docs/reference/grpc.md, from the comments of protos/: `python tests/proto_docs.py` writes it."""

import tempfile
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[1]
PROTO, PAGE = "moecluster/v1/inference.proto", ROOT / "docs" / "reference" / "grpc.md"
SERVICE, MESSAGE, ENUM, FIELD_OF_MESSAGE = 6, 4, 5, 2  # field numbers of descriptor.proto, of which paths are made
HEAD = """# gRPC

Made by `python tests/proto_docs.py` from [inference.proto](../../protos/moecluster/v1/inference.proto), package
`moecluster.v1`. [Call it](../calling.md) has examples.

"""


def described():
    """The proto's descriptor with its comments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        includes = [f"-I{ROOT / 'protos'}", f"-I{files('grpc_tools') / '_proto'}"]
        assert protoc.main(["protoc", *includes, "--include_source_info", f"--descriptor_set_out={out}", PROTO]) == 0
        return FileDescriptorSet.FromString(out.read_bytes()).file[0]


def comments(proto):
    """Path of an element → its comment in one line."""
    known = {}
    for place in proto.source_code_info.location:
        text = place.leading_comments or place.trailing_comments
        known[tuple(place.path)] = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return known


def link(type_name):
    name = type_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})" if type_name.startswith(".moecluster") else f"`{type_name.lstrip('.')}`"


def kind(field, maps=None):
    """maps: a message's entries of maps, which protoc describes as nested messages, by name."""
    entry = (maps or {}).get(field.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = (Field.Type.Name(one.type).removeprefix("TYPE_").lower() for one in entry.field)
        return f"`map<{key}, {value}>`"
    plain = Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = link(field.type_name) if field.type_name else f"`{plain}`"
    return f"repeated {name}" if field.label == Field.LABEL_REPEATED else name


def service(proto, texts):
    lines = []
    for index, one in enumerate(proto.service):
        lines += [f"## {one.name}", "", texts.get((SERVICE, index), ""), ""]
        lines += ["| call | takes | gives | |", "| --- | --- | --- | --- |"]
        for number, method in enumerate(one.method):
            gives = ("a stream of " if method.server_streaming else "") + link(method.output_type)
            text = texts.get((SERVICE, index, 2, number), "")
            lines.append(f"| `{method.name}` | {link(method.input_type)} | {gives} | {text} |")
        lines.append("")
    return lines


def messages(proto, texts):
    lines = []
    for index, message in enumerate(proto.message_type):
        lines += [f"## {message.name}", "", texts.get((MESSAGE, index), ""), ""]
        maps = {entry.name: entry for entry in message.nested_type if entry.options.map_entry}
        if message.field:
            lines += ["| field | type | |", "| --- | --- | --- |"]
        for number, field in enumerate(message.field):
            text = texts.get((MESSAGE, index, FIELD_OF_MESSAGE, number), "")
            lines.append(f"| `{field.name}` | {kind(field, maps)} | {text} |")
        lines.append("")
    for index, enum in enumerate(proto.enum_type):
        lines += [f"## {enum.name}", "", texts.get((ENUM, index), ""), ""]
        lines += ["| value | |", "| --- | --- |"]
        lines += [f"| `{v.name}` | {texts.get((ENUM, index, 2, n), '')} |" for n, v in enumerate(enum.value)] + [""]
    return lines


def page():
    proto = described()
    texts = comments(proto)
    return HEAD + "\n".join(service(proto, texts) + messages(proto, texts)).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
