"""Reading machine code, as cuobjdump -sass prints it: instructions and loops."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE
)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_WIDTH = re.compile(r"\.(8|16|32|64|128)\b|\.[US](8|16)\b")


@dataclass(frozen=True)
class Instruction:
    """``opcode`` with its modifiers ("LDG.E.128"); ``guarded``: executed only where a predicate holds."""

    address: int
    guarded: bool
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def bytes_(self) -> int:
        """Bytes that a thread moves, of a load or store."""
        width = _WIDTH.search(self.opcode)
        return int(width[1] or width[2]) // 8 if width else 4


def instructions(text: str) -> list[Instruction]:
    """All instructions of the one function in ``text``, in the order of their addresses."""
    return [Instruction(int(a, 16), bool(p), op, rest.strip()) for a, p, op, rest in _INSTRUCTION.findall(text)]


def _successors(code: Sequence[Instruction]) -> list[list[int]]:
    """Indices of what may run next. A call is taken to return, so that a subroutine is no loop."""
    index = {x.address: i for i, x in enumerate(code)}
    following = []
    for i, x in enumerate(code):
        goes_on = x.guarded or x.name not in ("EXIT", "RET", "BRA", "BRX", "JMP")
        target = _TARGET.search(x.operands) if x.name in ("BRA", "JMP", "CALL") else None
        if x.name == "BRA" and "," in x.operands:  # a predicate or mask among the operands
            goes_on = True
        edges = [i + 1] if goes_on and i + 1 < len(code) else []
        if target and int(target[1], 16) in index:
            edges.append(index[int(target[1], 16)])
        following.append(edges)
    return following


def loops(code: Sequence[Instruction]) -> list[list[int]]:
    """The outermost loops: the indices of their instructions, loops and indices in the order of the code.

    Addresses alone do not tell: ptxas moves rarely taken parts of a loop behind the end of the kernel. So these are the
    strongly connected components of the flow graph, found by Tarjan's algorithm (without recursion).
    """
    following = _successors(code)
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack = [False] * len(code)
    result = []
    for root in range(len(code)):
        if root in order:
            continue
        work = [(root, iter(following[root]))]
        while work:
            node, edges = work[-1]
            if node not in order:
                order[node] = low[node] = len(order)
                stack.append(node)
                on_stack[node] = True
            child = next((c for c in edges if c not in order or on_stack[c]), None)
            if child is not None and child not in order:
                work.append((child, iter(following[child])))
                continue
            if child is not None:
                low[node] = min(low[node], order[child])
                continue
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
            if low[node] == order[node]:
                start = stack.index(node)
                component = sorted(stack[start:])
                del stack[start:]
                for member in component:
                    on_stack[member] = False
                if len(component) > 1 or node in following[node]:
                    result.append(component)
    return sorted(result)
