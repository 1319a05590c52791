"""What a compiled program moves between devices, read from its HLO text."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all|collective-broadcast"
COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(-start)?\(")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
SHAPE = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\]")
_BITS = {"pred": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64,
         "u64": 64, "f64": 64}


@dataclass(frozen=True)
class Moved:
    """A collective of the program. bytes: ring-equivalent, all its runs in a step; times: how many those are. axis: of the mesh;
    `both` where it spans all devices of two. branch: in a branch that need not be taken.
    """

    kind: str
    shapes: tuple[str, ...]
    axis: str
    bytes: int
    times: int
    branch: bool


def moved(hlo: str, data: int, dict_: int) -> list[Moved]:
    """Every collective that the program can reach from its entry, loops counted as often as the compiler says they run (once
    where it does not). One that is spread over several fusions to hide it, with the same channel in all of them, counts once.
    """
    entry, bodies = _computations(hlo)
    out: list[Moved] = []
    channels: set[str] = set()

    def visit(name: str, times: int, branch: bool) -> None:
        for line in bodies.get(name, ()):
            if found := COLLECTIVE.search(line):
                channel = re.search(r"channel_id=(\d+)", line) if "fus" in name else None
                if channel and channel[1] in channels:
                    continue
                channels.update(channel.groups() if channel else ())
                out.append(_read(line, found, data, dict_, times, branch))
            for called, runs, optional in _called(line):
                visit(called, times * runs, branch or optional)

    visit(entry, 1, False)
    return out


def _computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    entry, bodies, current = "", {}, None
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            current = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return entry, bodies


def _called(line: str) -> Iterator[tuple[str, int, bool]]:
    """(computation, how often, whether only in a branch) of everything that an instruction runs but a reduction's operator."""
    if " while(" in line:
        count = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
        runs = int(count[1]) if count else 1
        yield from ((name, runs, False) for name in re.findall(r"(?:body|condition)=%?([\w.\-]+)", line))
    elif " conditional(" in line:
        names = re.search(r"branch_computations=\{([^}]*)\}", line)
        found = re.findall(r"[\w.\-]+", names[1]) if names else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
        yield from ((name, 1, True) for name in found)
    elif "calls=" in line or " call(" in line:
        yield from ((name, 1, False) for name in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line))


def _read(line: str, found: re.Match, data: int, dict_: int, times: int, branch: bool) -> Moved:
    text, kind, start = found[1], found[2], found[3]
    shapes = [match for match in SHAPE.finditer(text) if match[1] in _BITS]
    if start and kind != "all-reduce" and len(shapes) > 1:  # (what goes in, what comes out)
        shapes = shapes[len(shapes) // 2:]
    group, stride = group_of(line, data * dict_)
    size = sum(_BITS[s[1]] // 8 * math.prod(int(n) for n in s[2].split(",") if n) for s in shapes)
    if kind == "reduce-scatter":
        size *= group
    ring = size * (2 if kind == "all-reduce" else 1) * times if group > 1 else 0
    return Moved(kind, tuple(f"{s[1]}[{s[2]}]" for s in shapes), _axis(group, stride, data, dict_), ring, times, branch)


def _axis(group: int, stride: int, data: int, dict_: int) -> str:
    if dict_ == 1 or data == 1:
        return "dict" if data == 1 else "data"
    if group == data * dict_:
        return "both"
    return "dict" if stride == 1 else "data"


def group_of(line: str, n: int) -> tuple[int, int]:
    """(size, distance between neighbours) of the first replica group; the devices are numbered as the mesh lists them."""
    if lists := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        members = [int(i) for i in lists[1].split(",") if i]
    elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        groups, dims, order = (tuple(int(i) for i in part.split(",")) if part else None for part in iota.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        members = list((ids.transpose(order) if order else ids).reshape(groups)[0])
    elif mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([^)]*\))?[^)]*)\))? \{([^}]*)\}", line):
        members = _mesh_members(mesh[1], mesh[2], mesh[3])
    elif pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        members = [int(pairs[1]), int(pairs[2])]
    else:
        members = list(range(n))
    return len(members), int(members[1] - members[0]) if len(members) > 1 else 1


def _mesh_members(axes: str, order: str | None, named: str) -> list[int]:
    """The first group of `mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}`: the devices along the named axes."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if order and (parts := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)):
        ids = ids.reshape([int(i) for i in parts[1].split(",")])
        ids = ids.transpose([int(i) for i in parts[2].split(",")]) if parts[2] else ids
    ids = ids.reshape(tuple(sizes.values()))
    keep = re.findall(r"'(\w+)'", named)
    return list(ids[tuple(slice(None) if name in keep else 0 for name in sizes)].reshape(-1))
