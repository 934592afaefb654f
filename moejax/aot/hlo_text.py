"""The text of a compiled program, as computations of instructions, and how often each of them runs.

XLA offers costs and sizes of a program as a whole; what it exchanges, and when, is only in the text. This reads as much of the
grammar as that needs: names, shapes, operands, attributes, and the trip counts of loops.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

_BITS = {
    "pred": 8,
    "s2": 2,
    "u2": 2,
    "s4": 4,
    "u4": 4,
    "f4e2m1fn": 4,
    "bf16": 16,
    "c64": 64,
    "c128": 128,
    "token": 0,
    "opaque": 0,
}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\]")
_NAME = re.compile(r"%?([^\s(),{}]+)\s*$")
# Instructions and the lines that open and close computations begin on lines of their own; strings may hold line breaks.
_LINES = re.compile(r"\n(?=\s*(?:ROOT )?%[^\s]+ = |%|ENTRY |\})")
_OPEN, _CLOSE = "([{", ")]}"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      shape: result shape as text; a tuple is in parentheses.
      op: opcode, for example 'all-gather-start'.
      operands: names of the operands; of a constant or a parameter, the text in its parentheses.
      attributes: the rest of the line.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, name: str) -> str | None:
        """The text of an attribute up to the next one at its level; None if it is not there."""
        match = re.search(rf"(?:^|, ){name}=", self.attributes)
        return None if match is None else next(_split(self.attributes[match.end() :]), "")

    def calls(self, name: str) -> str:
        """The computation that an attribute names."""
        return (self.attribute(name) or "").removeprefix("%")

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from, for example 'jit(step)/while/body/dot_general'; '' if XLA does not say."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions, in the order in which they are scheduled; the last one in `root` gives the result."""

    name: str
    instructions: tuple[Instruction, ...]
    root: Instruction

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    def operand_shapes(self, instruction: Instruction) -> list[str]:
        return [self.by_name[name].shape for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """All computations by name, and the one that the program starts with."""

    computations: dict[str, Computation]
    entry: Computation

    def runs(self) -> Iterator[tuple[Computation, int, bool]]:
        """Computations that are run as such (not fused, not reducers), with how often one run of the program runs them.

        The last item says whether that number is known: a loop whose trip count cannot be read counts once, and so does each
        branch of a conditional.
        """
        todo = [(self.entry, 1, True)]
        while todo:
            computation, times, known = todo.pop()
            yield computation, times, known
            for instruction in computation.instructions:
                match instruction.op:
                    case "while":
                        trips = trip_count(self, computation, instruction)
                        body = self.computations[instruction.calls("body")]
                        todo.append((body, times * (1 if trips is None else trips), known and trips is not None))
                    case "call":
                        todo.append((self.computations[instruction.calls("to_apply")], times, known))
                    case "conditional":
                        todo += [(self.computations[name], times, False) for name in _branches(instruction)]


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: it is not the text of a compiled program.
    """
    computations: dict[str, Computation] = {}
    entry, name, body, root = None, "", [], None
    for line in _LINES.split(text):
        stripped = line.strip()
        if match := re.match(r"(ENTRY )?%?([^\s(]+) \(.*\{$", stripped, re.DOTALL):
            name, body, root = match[2], [], None
            entry = name if match[1] else entry
        elif stripped.startswith("}") and name:
            if body:
                computations[name] = Computation(name, tuple(body), root or body[-1])
            name = ""
        elif name and " = " in stripped:
            body.append(_instruction(stripped.removeprefix("ROOT ")))
            root = body[-1] if stripped.startswith("ROOT ") else root
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program (compiled.as_text())")
    return Module(computations, computations[entry])


def shape_bytes(shape: str) -> int:
    """Bytes of a shape without padding, a tuple's elements added up."""
    total = 0
    for dtype, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        size = math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d)
        total += -(-size * _bits(dtype) // 8)
    return total


def shape_dims(shape: str) -> tuple[int, ...]:
    """The sizes of the first array in a shape."""
    match = _ARRAY.search(shape)
    return tuple(int(d.lstrip("<=")) for d in match[2].split(",") if d) if match else ()


def shape_dtype(shape: str) -> str:
    """The type of the first array in a shape."""
    match = _ARRAY.search(shape)
    return match[1] if match else ""


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop's body runs: as XLA notes it, or from a counter that is compared with a constant; None if neither."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(match[1])
    condition, body = (module.computations[loop.calls(name)] for name in ("condition", "body"))
    test = _through_fusions(module, condition, condition.root)
    if test is None or (test[1].attribute("direction") != "LT"):
        return None
    left, right = (_value(module, test[0], name) for name in test[1].operands)
    if not (isinstance(left, _Element) and body.root.op == "tuple" and computation.by_name[loop.operands[0]].op == "tuple"):
        return None
    initial = computation.by_name[loop.operands[0]].operands
    start = _value(module, [computation], initial[left.index])
    limit = _value(module, [computation], initial[right.index]) if isinstance(right, _Element) else right
    step = _increment(module, body, left.index)
    if isinstance(start, int) and isinstance(limit, int) and step:
        return max(0, -(-(limit - start) // step))
    return None


@dataclasses.dataclass(frozen=True)
class _Element:
    """An element of a loop's state."""

    index: int


def _increment(module: Module, body: Computation, index: int) -> int | None:
    """What one turn of the loop adds to its counter."""
    found = _through_fusions(module, body, body.by_name[body.root.operands[index]])
    if found is None or found[1].op != "add":
        return None
    values = [_value(module, found[0], name) for name in found[1].operands]
    return next((v for v in values if isinstance(v, int)), None) if _Element(index) in values else None


def _through_fusions(module: Module, outer: Computation, instruction: Instruction) -> tuple[list, Instruction] | None:
    """The operation that a fusion ends in, with the way into it: computations and, between them, the fusions."""
    path: list = [outer]
    while instruction.op == "fusion":
        inner = module.computations[instruction.calls("calls")]
        path += [instruction, inner]
        instruction = inner.root
    return path, instruction


def _value(module: Module, path: Sequence, name: str) -> "int | _Element | None":
    """An integer constant or an element of the loop's state, followed through copies and out of fusions."""
    path = list(path)
    while True:
        computation: Computation = path[-1]
        instruction = computation.by_name[name]
        match instruction.op:
            case "constant":
                text = instruction.operands[0] if instruction.operands else ""
                return int(text) if re.fullmatch(r"-?\d+", text) else None
            case "copy" | "bitcast" | "convert":
                name = instruction.operands[0]
            case "parameter" if len(path) > 1:
                fusion = path[-2]
                path, name = path[:-2], fusion.operands[int(instruction.operands[0])]
            case "get-tuple-element" if computation.by_name[instruction.operands[0]].op == "parameter":
                return _Element(int(instruction.attribute("index") or 0))
            case _:
                return None


def _branches(instruction: Instruction) -> list[str]:
    if names := instruction.attribute("branch_computations"):
        return [name.strip().removeprefix("%") for name in names.strip("{}").split(",")]
    return [instruction.calls(name) for name in ("true_computation", "false_computation")]


def _instruction(line: str) -> Instruction:
    name, _, rest = re.sub(r"/\*.*?\*/", "", line).partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    op, inside = rest[:start].strip(), rest[start + 1 : stop]
    if op in ("constant", "parameter"):
        operands = (inside,)
    else:
        operands = tuple(match[1] for part in _split(inside) if (match := _NAME.search(part)))
    return Instruction(name.strip().removeprefix("%"), shape, op, operands, rest[stop + 1 :].removeprefix(", "))


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth, quoted, i = 0, False, start
    while i < len(text):
        c = text[i]
        if quoted:
            i += c == "\\"
            quoted = c != '"'
        elif c == '"':
            quoted = True
        elif c in _OPEN:
            depth += 1
        elif c in _CLOSE:
            depth -= 1
            if depth == 0:
                return i
        i += 1
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def _split(text: str) -> Iterator[str]:
    """The parts of `a, b={c, d}, e` that commas outside brackets and strings divide."""
    depth, quoted, start, i = 0, False, 0, 0
    while i < len(text):
        c = text[i]
        if quoted:
            i += c == "\\"
            quoted = c != '"'
        elif c == '"':
            quoted = True
        elif c in _OPEN:
            depth += 1
        elif c in _CLOSE:
            depth -= 1
        elif c == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
        i += 1
    if text[start:].strip():
        yield text[start:].strip()


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.match(r"[a-z]+(\d+)", dtype)
    return int(match[1]) if match else 0
