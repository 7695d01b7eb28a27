"""From a file on disk to plain YAML objects or lines, with every way that can go wrong worded.

YAML is read with libyaml's parser where PyYAML has it (a million inline literals are then a matter
of seconds), but composed in Python: libyaml's own composer recurses in C, and a file of a million
`[` ends the process with a segmentation fault instead of an error.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from yaml.composer import Composer
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.error import MarkedYAMLError, YAMLError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.resolver import Resolver

from streamguard.policy_errors import Unquoted, show

MAX_FILE_BYTES = 64 * 1024 * 1024
# The schema is four levels deep; the bound only has to stop hostile nesting.
MAX_DEPTH = 32

_STR_TAG = "tag:yaml.org,2002:str"
_UNQUOTED_TAG = "!unquoted:"
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "null": "null",
    "timestamp": "a date",
}

if TYPE_CHECKING or hasattr(yaml, "CSafeLoader"):
    from yaml._yaml import CParser as _EventSource
else:
    from yaml.parser import Parser
    from yaml.reader import Reader
    from yaml.scanner import Scanner

    class _EventSource(Reader, Scanner, Parser):
        def __init__(self, stream):
            Reader.__init__(self, stream)
            Scanner.__init__(self)
            Parser.__init__(self)


class _RefusedYAML(MarkedYAMLError):
    """Valid YAML that a policy may not use; `problem` says all but the place."""


class _Loader(Composer, _EventSource, SafeConstructor, Resolver):
    """SafeLoader that refuses duplicate keys, merge keys and deep nesting, and keeps what
    unquoted literals looked like."""

    def __init__(self, stream: str) -> None:
        _EventSource.__init__(self, stream)
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self._depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _RefusedYAML(
                problem=f"nested deeper than {MAX_DEPTH} levels; a policy needs four. Flatten it.",
                problem_mark=getattr(self.peek_event(), "start_mark", None),
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def flatten_mapping(self, node: MappingNode) -> None:
        # Merge keys nested in lists grow exponentially, and no policy needs them.
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise _RefusedYAML(
                    problem='merge key "<<" is not supported; write the merged keys out.',
                    problem_mark=key_node.start_mark,
                )

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        first_line: dict[Hashable, int] = {}
        for key_node, value_node in node.value if isinstance(node, MappingNode) else ():
            if not isinstance(key_node, ScalarNode):
                continue  # unhashable, or refused as unknown by the schema
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in first_line:
                raise _RefusedYAML(
                    problem=f"key {show(key)} occurs twice in one mapping (first on line "
                    f"{first_line[key]}); YAML would silently keep the last one. Delete one.",
                    problem_mark=key_node.start_mark,
                )
            first_line[key] = line
            if key in ("literals", "regexes"):
                _keep_text_of_unquoted(value_node)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        # PyYAML lets the conversions' own errors through: 2024-13-45, "!!int x", "!!bool x".
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ConstructorError(
                problem=f"{show(node.value)} is no valid {node.tag.rpartition(':')[2]}",
                problem_mark=node.start_mark,
            ) from error


def _keep_text_of_unquoted(node: Node) -> None:
    for item in node.value if isinstance(node, SequenceNode) else [node]:
        # "- " with nothing after it stays null: there is no text to keep.
        if isinstance(item, ScalarNode) and item.tag != _STR_TAG and item.value:
            item.tag = _UNQUOTED_TAG + item.tag.rpartition(":")[2]


def _construct_unquoted(_loader: Any, tag_suffix: str, node: Any) -> Unquoted:
    return Unquoted(str(node.value), _KINDS.get(tag_suffix, f"a {tag_suffix}"))


_Loader.add_multi_constructor(_UNQUOTED_TAG, _construct_unquoted)


class UnreadableError(Exception):
    """A file that cannot be used as a whole. The caller adds the place and makes a PolicyError."""


def read_text(path: Path, *, keep_bad_bytes: bool = False) -> str:
    """Read a UTF-8 file of at most 64 MiB, without its byte order mark.

    keep_bad_bytes  read bytes that are no UTF-8 as lone surrogates U+DC80..U+DCFF, so that the
                    caller can tell which lines hold them.

    Raises UnreadableError when it is missing, a folder, not permitted, too large or not UTF-8; the
    last names the byte offset and the line.
    """
    try:
        # Reading one byte too many finds the size of pipes too, which have none to ask for.
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise UnreadableError(
            f"no such file; looked for {path.absolute()}. Correct the path (a literals_file is "
            f"relative to its policy file) or create the file."
        ) from None
    except IsADirectoryError:
        raise UnreadableError(
            f"{path} is a folder; a file is needed, since only its content can be matched. "
            f"Name one in it."
        ) from None
    except PermissionError:
        raise UnreadableError(
            f"{path} may not be read by this user; a rule that is not read would not guard. "
            f"Grant read permission."
        ) from None
    except (OSError, ValueError) as error:
        raise UnreadableError(f"cannot be read ({error}). Correct the path.") from None
    if len(data) > MAX_FILE_BYTES:
        raise UnreadableError(
            f"the file is larger than {MAX_FILE_BYTES:,} bytes, the most that is read, so that a "
            f"wrong path cannot exhaust memory. Shorten it or split it over several rules."
        )
    try:
        text = data.decode("utf-8", "surrogateescape" if keep_bad_bytes else "strict")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnreadableError(
            f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} (line {line}). "
            f"Text in another encoding would never match what a model writes. Convert it: "
            f"iconv -f ITS-ENCODING -t UTF-8."
        ) from None
    return text.removeprefix("\ufeff")


def parse_yaml(text: str) -> Any:
    """Parse one YAML document into plain objects; UnreadableError names line and column."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        if isinstance(error, _RefusedYAML):
            raise UnreadableError(f"{place}{error.problem}") from None
        what = " ".join(part for part in (error.context, error.problem) if part)
        remedy = (
            'Indent with spaces, and quote values that hold ": " or " #" or start with one of '
            "*&!%@`[{."
        )
        if "single document" in what:
            remedy = "Move the second document into a file of its own."
        elif isinstance(error, ConstructorError):
            remedy = "Use plain strings, numbers, lists and mappings; quote what is meant as text."
        raise UnreadableError(f"{place}not valid YAML: {what}. {remedy}") from None
    except YAMLError as error:
        reason = getattr(error, "reason", None) or str(error).partition("\n")[0]
        position = getattr(error, "position", None)
        place = "" if position is None else f"offset {position}: "
        raise UnreadableError(
            f"{place}not valid YAML: {reason}. Delete the character or write its escape in quotes."
        ) from None
    finally:
        if loader is not None and hasattr(loader, "dispose"):
            loader.dispose()
