"""Where the time of a trace went: seconds of each part of the model, and the operations that took most.

    python -m benchmarks.profile runs/sft                     the newest trace of train.profile_steps
    python -m benchmarks.profile TRACE.xplane.pb --out=FILE.json

Parts are the named scopes of `storm_jax.models.storm` and `storm_jax.train.step`, forward and backward; layers that are
computed again count as backward. The trace has the compiled programs, which name the scope of each operation; XLA may
fuse operations of two parts, and names one of them. Operations without a scope are "other". Where several run at the
same time, each gets its share, so that seconds add up to those in which the device was busy.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from jax.profiler import ProfileData

from benchmarks.xspace import Operation, scopes
from storm_jax.files import write_atomically

PARTS = ("vision", "projector", "pool", "decoder", "loss", "optimizer")
LISTED = 12  # operations
_SCOPE = re.compile(rf"(?:^|[/(])({'|'.join(PARTS)})(?=[/)])")


def part_of(scope: str) -> str:
    """The part of the model, with "forward" or "backward" where a gradient is taken."""
    match = _SCOPE.search(scope)
    if not match or "jvp(" not in scope:
        return match[1] if match else "other"
    return f"{match[1]} {'backward' if 'transpose(jvp(' in scope else 'forward'}"


def busy_seconds(trace: ProfileData, known: Iterable[Operation]) -> dict[Operation, float]:
    """Seconds of each known operation; operations of one device that run at the same time share them."""
    edges: dict[tuple, list[tuple[float, int, Operation]]] = defaultdict(list)  # of each device
    for plane in trace.planes:
        events = [(event, dict(event.stats)) for line in plane.lines for event in line.events]
        # On CPU, an operation that hands work to other threads ends with an event of its own.
        ends = {
            stats["_c"]: event.end_ns
            for event, stats in events
            if event.name.startswith("end: ") and "_c" in stats
        }
        for event, stats in events:
            program = f"{stats.get('hlo_module')}({stats.get('program_id')})"
            operation = (program, str(stats.get("hlo_op")))
            if operation in known:
                device = edges[plane.name, stats.get("device_ordinal")]
                device.append((event.start_ns, 1, operation))
                device.append((max(event.end_ns, ends.get(stats.get("_p"), 0)), -1, operation))
    seconds: dict[Operation, float] = defaultdict(float)
    for device in edges.values():
        running: Counter[Operation] = Counter()
        before = 0.0
        for now, change, operation in sorted(device, key=lambda edge: (edge[0], -edge[1])):
            for each, count in running.items():
                seconds[each] += (now - before) * 1e-9 * count / running.total() / len(edges)
            before = now
            running[operation] += change
            if not running[operation]:
                del running[operation]
    return seconds


def summary(path: pathlib.Path) -> dict[str, Any]:
    """Seconds by part and of the most expensive operations, of a device on average."""
    content = path.read_bytes()
    trace = ProfileData.from_serialized_xspace(content)
    known = scopes(content)
    seconds = busy_seconds(trace, known)
    parts: dict[str, float] = defaultdict(float)
    for operation, value in seconds.items():
        parts[part_of(known[operation])] += value
    listed = sorted(seconds, key=seconds.__getitem__, reverse=True)[:LISTED]
    return {
        "seconds": sum(seconds.values()),
        "parts": dict(sorted(parts.items(), key=lambda part: -part[1])),
        "operations": [
            {"name": name[1], "scope": known[name], "seconds": seconds[name]} for name in listed
        ],
    }


def table(found: dict[str, Any]) -> str:
    total = found["seconds"]
    lines = [f"{total:.3f} s of operations"]
    lines += [
        f"{value:>9.3f} s {value / total:>6.1%}  {part}" for part, value in found["parts"].items()
    ]
    lines.append("the most expensive operations")
    for each in found["operations"]:
        value = each["seconds"]
        lines.append(f"{value:>9.3f} s {value / total:>6.1%}  {each['name']}  {each['scope']}")
    return "\n".join(lines)


def newest_trace(path: pathlib.Path) -> pathlib.Path:
    """The trace at a path, or the newest one in a folder."""
    found = [path] if path.is_file() else sorted(path.rglob("*.xplane.pb"))
    if not found:
        sys.exit(f"{path} has no trace (*.xplane.pb): train with --config.train.profile_steps=A:B")
    return found[-1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=pathlib.Path, help="a .xplane.pb file or a folder with some")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file")
    args = parser.parse_args(arguments)
    found = summary(newest_trace(args.trace))
    print(table(found))
    if args.out:
        write_atomically(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
