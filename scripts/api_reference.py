"""The reference of the control API, from the comments in `proto/`, for `docs/control-api.md`.

What stands above the page's mark is written by hand and stays. `reference_pages.py` writes the page.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "control-api.md"
MARK = "<!-- From here on written by scripts/reference_pages.py from proto/. -->\n"
PACKAGE = ".kvtier.v1."

# Field numbers of descriptor.proto: how source locations name what they belong to.
_FILE_MESSAGE, _FILE_ENUM, _FILE_SERVICE = 4, 5, 6
_MESSAGE_FIELD, _ENUM_VALUE, _SERVICE_METHOD = 2, 2, 2

_Field = descriptor_pb2.FieldDescriptorProto


@dataclass(frozen=True, slots=True)
class Proto:
    """One `.proto` file, with the comment of each thing in it by the thing's path."""

    file: descriptor_pb2.FileDescriptorProto
    comments: dict[tuple[int, ...], str]

    def comment(self, *path: int) -> str:
        """Return the comment before a thing as one line; empty without one."""
        return self.comments.get(path, "")


def read_protos() -> list[Proto]:
    """Compile `proto/kvtier/v1`, comments included.

    Raises:
        RuntimeError: protoc refused; what is wrong is on standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors"
        arguments = ["protoc", f"-I{ROOT / 'proto'}", f"-I{files('grpc_tools') / '_proto'}"]
        arguments += ["--include_source_info", f"--descriptor_set_out={out}"]
        sources = sorted((ROOT / "proto" / "kvtier" / "v1").glob("*.proto"))
        if protoc.main([*arguments, *map(str, sources)]):
            raise RuntimeError("protoc refused proto/kvtier/v1")
        found = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    return [
        Proto(
            file,
            {
                tuple(location.path): " ".join(location.leading_comments.split())
                for location in file.source_code_info.location
            },
        )
        for file in found.file
    ]


def reference(protos: Sequence[Proto]) -> str:
    """Return the reference as Markdown: the services, then the messages and enums that they share."""
    lines: list[str] = []
    shown: set[str] = set()
    for proto in protos:
        for index, service in enumerate(proto.file.service):
            lines += [f"## {service.name}", "", proto.comment(_FILE_SERVICE, index), ""]
            for number, method in enumerate(service.method):
                says = proto.comment(_FILE_SERVICE, index, _SERVICE_METHOD, number)
                answers = "Answers, a stream" if method.server_streaming else "Answer"
                lines += [f"### {method.name}", "", says, ""]
                for part, name in (("Request", method.input_type), (answers, method.output_type)):
                    shown.add(name)
                    table = _message(protos, name)
                    lines += [f"{part}: `{_short(name)}`{':' if table else ', empty.'}", ""]
                    lines += [*table, ""] if table else []
    lines += ["## Messages", ""]
    for proto, index, message in _messages(protos):
        if PACKAGE + message.name not in shown:
            lines += [f"### {message.name}", ""]
            if says := proto.comment(_FILE_MESSAGE, index):
                lines += [says, ""]
            lines += [*_message(protos, PACKAGE + message.name), ""]
    lines += ["## Enums", ""]
    for proto in protos:
        for index, enum in enumerate(proto.file.enum_type):
            lines += [f"### {enum.name}", ""]
            if says := proto.comment(_FILE_ENUM, index):
                lines += [says, ""]
            lines += ["| value | number | meaning |", "|---|---|---|"]
            for number, value in enumerate(enum.value):
                says = proto.comment(_FILE_ENUM, index, _ENUM_VALUE, number)
                lines.append(f"| `{value.name}` | {value.number} | {_cell(says)} |")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def page(current: str) -> str:
    """Return the page with its generated part anew."""
    return current.partition(MARK)[0] + MARK + "\n" + reference(read_protos())


def _messages(
    protos: Sequence[Proto],
) -> Iterator[tuple[Proto, int, descriptor_pb2.DescriptorProto]]:
    for proto in protos:
        for index, message in enumerate(proto.file.message_type):
            yield proto, index, message


def _message(protos: Sequence[Proto], name: str) -> list[str]:
    """Return the table of a message's fields; nothing for an empty one."""
    proto, index, message = next(m for m in _messages(protos) if PACKAGE + m[2].name == name)
    if not message.field:
        return []
    lines = ["| field | type | meaning |", "|---|---|---|"]
    for number, field in enumerate(message.field):
        says = proto.comment(_FILE_MESSAGE, index, _MESSAGE_FIELD, number)
        # A proto3 `optional` field is, for the compiler, alone in a choice.
        if field.HasField("oneof_index") and not field.proto3_optional:
            choice = f"One of `{message.oneof_decl[field.oneof_index].name}`."
            says = f"{choice} {says}".strip()
        lines.append(f"| `{field.name}` | {_type(message, field)} | {_cell(says)} |")
    return lines


def _type(message: descriptor_pb2.DescriptorProto, field: _Field) -> str:
    entries = {f"{PACKAGE}{message.name}.{nested.name}": nested for nested in message.nested_type}
    if (entry := entries.get(field.type_name)) is not None:
        key, value = (_name(part) for part in entry.field)
        return f"map from {key} to {value}"
    named = _name(field)
    if field.label == _Field.LABEL_REPEATED:
        return f"repeated {named}"
    return f"optional {named}" if field.proto3_optional else named


def _name(field: _Field) -> str:
    if field.type_name.startswith(PACKAGE):
        short = _short(field.type_name)
        return f"[{short}](#{short.lower()})"
    if field.type_name:
        return _short(field.type_name)
    return str(_Field.Type.Name(field.type)).removeprefix("TYPE_").lower()


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
