"""PTX text to modules, functions and statements (PTX ISA, chapters 4 and 5)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Union

REPOSITORY = Path(__file__).resolve().parents[2]

SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1}
SIZES.update({kind + "16": 2 for kind in ("b", "u", "s", "f", "bf")})
SIZES.update({kind + "32": 4 for kind in ("b", "u", "s", "f")})
SIZES.update({kind + "64": 8 for kind in ("b", "u", "s", "f")})
SIZES.update({"f16x2": 4, "bf16x2": 4})


class TranslationError(Exception):
    """Something this package cannot translate; `line` is filled in by whoever knows it."""


@dataclass
class Variable:
    """`.shared .align 4 .b8 name[16]` and its kin."""

    space: str
    name: str
    type: str
    count: int
    align: int
    extern: bool = False
    values: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return SIZES[self.type] * self.count


@dataclass
class Position:
    """A source line, in the repository where it is from there."""

    file: str
    line: int


@dataclass
class Open:
    pass


@dataclass
class Close:
    pass


@dataclass
class Label:
    name: str


@dataclass
class Registers:
    """`.reg .b32 %r<10>, x`: type and the names, `%r<10>` standing for %r0 to %r9."""

    type: str
    names: list[str]


@dataclass
class BranchTargets:
    name: str
    labels: list[str]


@dataclass
class Instruction:
    """`@!%p mul.lo.s32 a, b, c;`

    A handler takes the modifiers that it understands; one that is left over is an error.
    """

    opcode: str
    modifiers: list[str]
    operands: list[str]
    guard: Optional[str]
    text: str

    def take(self, *choices: str) -> Optional[str]:
        """The first modifier that is one of these, which is then gone."""
        for modifier in self.modifiers:
            if modifier in choices:
                self.modifiers.remove(modifier)
                return modifier
        return None

    def need(self, *choices: str) -> str:
        found = self.take(*choices)
        if found is None:
            raise TranslationError("expected one of ." + ", .".join(choices))
        return found

    def type(self, *allowed: str) -> str:
        """The last modifier, a type."""
        name = self.modifiers.pop() if self.modifiers else ""
        if name not in (allowed or SIZES):
            raise TranslationError(f"type .{name}")
        return name

    def operand_count(self, *counts: int) -> None:
        if len(self.operands) not in counts:
            raise TranslationError(f"{len(self.operands)} operands")


Item = Union[Open, Close, Label, Registers, BranchTargets, Variable, Instruction]


@dataclass
class Statement:
    item: Item
    line: int  # in the PTX file
    position: Optional[Position]


@dataclass
class Function:
    name: str
    entry: bool
    params: list[Variable]
    results: list[Variable]
    max_threads: int
    body: list[Statement]


@dataclass
class Module:
    variables: list[Variable]
    functions: list[Function]


def split_operands(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()] if text.strip() else []


def _only_code(text: str) -> str:
    """Without comments and debug sections; line numbers stay."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match.group().count("\n")

    text = re.sub(r"/\*.*?\*/", blank, text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"^\s*\.section\s+\S+\s*\{[^}]*\}", blank, text, flags=re.M)


@dataclass
class _Token:
    kind: str  # one of _PATTERNS, or the brace itself
    text: str
    line: int


# The first that matches is the token. A header ends at the brace that opens a body, a statement at
# its semicolon: braces of operands and initialisers stay inside.
_PATTERNS = {
    "line": re.compile(r"\.(loc|file)\b[^\n]*"),
    "target": re.compile(r"\.(version|target|address_size)\b[^\n]*"),
    "brace": re.compile(r"[{}]"),
    "label": re.compile(r"[$%\w]+\s*:(?!:)"),
    "header": re.compile(r"\.(?:visible|weak|entry|func)\b[^;{=]*(?=\{)", re.S),
    "statement": re.compile(r"[^;]*;", re.S),
}
_BLANK = re.compile(r"\s*")


def _tokens(text: str) -> Iterator[_Token]:
    position, line = 0, 1
    while True:
        blank = _BLANK.match(text, position)
        line += blank.group().count("\n")
        position = blank.end()
        if position == len(text):
            return
        found = ((kind, pattern.match(text, position)) for kind, pattern in _PATTERNS.items())
        kind, match = next(((k, m) for k, m in found if m), ("", None))
        if match is None:
            raise TranslationError(f"line {line}: no statement: {text[position : position + 40]!r}")
        value = match.group().rstrip(";:").strip()
        yield _Token(value if kind == "brace" else kind, value, line)
        line += match.group().count("\n")
        position = match.end()


# State space, attributes, type, name, [count], = initialiser.
_VARIABLE = re.compile(
    r"\.(shared|global|const|local|param)\s+((?:\.\w+(?:\s+\d+)?\s+)*)\.(\w+)\s+([\w$]+)"
    r"\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)


def parse_variable(text: str, extern: bool = False) -> Optional[Variable]:
    match = _VARIABLE.match(text)
    if not match:
        return None
    space, attributes, kind, name, dimensions, values = match.groups()
    if kind not in SIZES:
        raise TranslationError(f"variable of type .{kind}")
    count = 1
    for dimension in re.findall(r"\[(\d*)\]", dimensions):
        count *= int(dimension or 0)
    align = re.search(r"\.align\s+(\d+)", attributes)
    initial = split_operands(re.sub(r"[{}]", "", values)) if values else []
    return Variable(
        space, name, kind, count, int(align.group(1)) if align else SIZES[kind], extern, initial
    )


def _parse_statement(text: str) -> Optional[Item]:
    if text.startswith(".reg"):
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
        return Registers(match.group(1), split_operands(match.group(2)))
    if text.startswith(".pragma"):
        return None
    if text.startswith(".branchtargets"):  # its name is the label before
        return BranchTargets("", split_operands(text[len(".branchtargets") :]))
    if text.startswith("."):
        variable = parse_variable(text)
        if variable is None:
            raise TranslationError(f"directive {text}")
        return variable
    match = re.match(r"(?:@(!?\s*[%\w$]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    if not match:
        raise TranslationError(f"statement {text!r}")
    guard, operation, operands = match.groups()
    opcode, *modifiers = operation.split(".")
    return Instruction(opcode, modifiers, split_operands(operands), guard, " ".join(text.split()))


class _Lines:
    """`.file` and `.loc`: where a statement comes from.

    Functions are inlined, and a wrapper around one instruction is not the line to name: the
    innermost position outside of the toolkit's headers and of files called ptx.cuh counts.
    `inlined_at` names the caller's position, whose own `.loc`, if it was inlined too, came before.
    """

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._callers: dict[tuple[str, str, str], Optional[tuple[str, str, str]]] = {}
        self.position: Optional[Position] = None

    def read(self, text: str) -> None:
        file = re.match(r'\.file\s+(\d+)\s+"([^"]+)"', text)
        if file:
            path = Path(file.group(2))
            self._files[file.group(1)] = str(
                path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path
            )
            return
        here = re.match(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)", text)
        caller = re.search(r"inlined_at\s+(\d+)\s+(\d+)\s+(\d+)", text)
        if not here:
            raise TranslationError(text)
        self._callers[here.groups()] = caller.groups() if caller else None
        place = here.groups()
        for _ in range(64):  # a recursive inlining would not end
            outer = self._callers.get(place)
            if outer is None or not self._is_wrapper(place):
                break
            place = outer
        if place[1] != "0":  # line 0: no line in particular; the one before still says more
            self.position = Position(self._files.get(place[0], "?"), int(place[1]))

    def _is_wrapper(self, place: tuple[str, str, str]) -> bool:
        file = self._files.get(place[0], "")
        toolkit = file.endswith((".h", ".hpp")) and Path(file).is_absolute()
        return place[1] == "0" or toolkit or Path(file).name == "ptx.cuh"


_FUNCTION = re.compile(
    r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\s+(?:\((.*?)\)\s*)?([\w$]+)\s*(?:\((.*?)\))?\s*([^()]*)$",
    re.S,
)


def _parse_header(text: str) -> Function:
    match = _FUNCTION.match(text)
    if not match:
        raise TranslationError(text)
    kind, results, name, params, attributes = match.groups()

    def variables(listing: Optional[str]) -> list[Variable]:
        found = [parse_variable(p) for p in split_operands(listing or "")]
        if None in found:
            raise TranslationError(f"parameters {listing}")
        return found

    threads = re.search(r"\.(?:max|req)ntid\s+([\d,\s]+)", attributes)
    count = 1
    for extent in threads.group(1).split(",") if threads else ["1024"]:
        count *= int(extent)
    return Function(name, kind == "entry", variables(params), variables(results), count, [])


def parse(text: str) -> Module:
    module, lines = Module([], []), _Lines()
    text = _only_code(text)
    for line in re.findall(r"^\s*(\.file\b.*)$", text, re.M):  # they come last in the file
        lines.read(line)
    function: Optional[Function] = None
    header: Optional[str] = None
    depth = 0
    for token in _tokens(text):
        try:
            if token.kind == "line":
                if token.text.startswith(".loc"):
                    lines.read(token.text)
            elif token.kind == "target":
                continue
            elif token.kind == "header":
                header = token.text
            elif token.kind == "{":
                depth += 1
                if depth == 1:
                    function, lines.position = _parse_header(header), None
                elif function:
                    function.body.append(Statement(Open(), token.line, lines.position))
            elif token.kind == "}":
                depth -= 1
                if depth == 0 and function:
                    module.functions.append(function)
                    function = None
                elif function:
                    function.body.append(Statement(Close(), token.line, lines.position))
            elif function:
                item = Label(token.text) if token.kind == "label" else _parse_statement(token.text)
                if isinstance(item, BranchTargets):
                    item.name = function.body.pop().item.name
                if item:
                    function.body.append(Statement(item, token.line, lines.position))
            elif depth == 0:
                extern = ".extern" in token.text
                variable = parse_variable(
                    re.sub(r"\.(visible|weak|extern)\s+", "", token.text), extern
                )
                if variable:
                    module.variables.append(variable)
                elif not re.match(
                    r"(\.\w+\s+)*\.(func|entry)\b", token.text
                ):  # a declaration says nothing new
                    raise TranslationError(token.text)
        except TranslationError as error:
            raise TranslationError(f"line {token.line}: {error}") from None
    return module
