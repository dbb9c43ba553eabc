"""Load and faults of the server: requests a second, waiting times, and what a thousand bad requests leave behind.

    python -m benchmarks.serve --workdir=runs/sft --videos=data/shapes/media/test --out=runs/serve

Load: 1, 8 and 32 clients ask about different videos, in streams of up to 32 tokens, drawn at a temperature at which answers rarely
end. Each client asks as soon as it has its answer. One client is the reference. Videos have been seen before, so that they are
encoded once.

Faults: 1,000 requests, half of them malformed in random ways, and 100 while processes that decode are killed. No request may get
an error of the server, except one for each kill; afterwards nothing is open, no file is left in the folder for temporary ones, and
the memory of the process must not have grown.

Clients run on the same machine. Writes OUT/serve.json and prints tables.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import itertools
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from benchmarks.machine import machine
from storm_jax.files import write_atomically

CLIENTS = (1, 8, 32)
TOKENS = 32
MODEL = "storm"


class Server(NamedTuple):
    process: subprocess.Popen
    port: int
    temporary: pathlib.Path

    @property
    def resident(self) -> int:
        """Bytes of the process in memory."""
        pages = pathlib.Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def workers(self) -> list[int]:
        """The processes that decode."""
        pid = self.process.pid
        children = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
        return [int(child) for file in children for child in file.read_text().split()]


@contextlib.contextmanager
def serve(workdir: pathlib.Path) -> Iterator[Server]:
    """Runs the server until the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "storm_jax.serve", f"--workdir={workdir}", "--port=0"]
        command += [f"--name={MODEL}", "--max_queued=64", "--length=1024"]
        environment = {**os.environ, "TMPDIR": folder}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            (ready,) = itertools.islice((line for line in lines if line.startswith("serving")), 1)
            yield Server(process, int(ready.rpartition(":")[2]), pathlib.Path(folder))
        finally:
            process.terminate()
            process.wait()


class Times(NamedTuple):
    """One answer: seconds to its first token, between tokens, and in all."""

    first: float
    gaps: list[float]
    whole: float


def body(question: str, url: str, **options: Any) -> dict[str, Any]:
    content = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **options}


def data_url(path: pathlib.Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def stream(port: int, request: Mapping[str, Any]) -> Times:
    """Asks, and reads the answer as it is written."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    began = time.perf_counter()
    content = json.dumps({**request, "stream": True})
    connection.request(
        "POST", "/v1/chat/completions", content, {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    assert response.status == 200, response.read()
    marks = [
        time.perf_counter()
        for line in response
        if line.startswith(b"data: {")
        and json.loads(line[6:])["choices"][0]["delta"].get("content")
    ]
    whole = time.perf_counter() - began
    connection.close()
    gaps = [after - before for before, after in itertools.pairwise(marks)]
    return Times((marks or [began + whole])[0] - began, gaps, whole)


def load(port: int, urls: Sequence[str], clients: int, requests: int) -> dict[str, float]:
    """Sends requests from several clients at once."""
    asked = [
        body(f"What happens? {n}", urls[n % len(urls)], temperature=5.0, seed=n, max_tokens=TOKENS)
        for n in range(requests)
    ]
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda request: stream(port, request), asked))
    seconds = time.perf_counter() - began
    gaps = sorted(gap for answer in answers for gap in answer.gaps)
    firsts = sorted(answer.first for answer in answers)
    return {
        "clients": clients,
        "requests": requests,
        "requests a second": requests / seconds,
        "tokens a second": (len(gaps) + requests) / seconds,
        "first token": statistics.median(firsts),
        "first token, 95 %": firsts[int(0.95 * len(firsts))],
        "gap": statistics.median(gaps),
        "gap, 95 %": gaps[int(0.95 * len(gaps))],
    }


def post(port: int, content: bytes) -> int:
    """The status of a request; 0 if the connection broke."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", content, headers)
        response = connection.getresponse()
        response.read()
        return response.status
    except OSError:
        return 0
    finally:
        connection.close()


def malformed(rng: random.Random, good: dict[str, Any]) -> bytes:
    """A request that is wrong in a random way."""
    content = json.dumps(good).encode()
    cut = rng.randrange(len(content))
    damaged = bytearray(content)
    for _ in range(10):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    url = good["messages"][0]["content"][0]["video_url"]["url"]
    clip = bytearray(base64.b64decode(url.partition(",")[2]))
    for _ in range(200):
        clip[rng.randrange(len(clip))] = rng.randrange(256)
    broken = f"data:video/mp4;base64,{base64.b64encode(clip).decode()}"
    short = f"data:video/mp4;base64,{base64.b64encode(clip[: len(clip) // 2]).decode()}"
    wrong = [
        content[:cut],
        bytes(damaged),
        json.dumps(good | {rng.choice(["n", "max_tokens", "temperature", "seed"]): -7}).encode(),
        json.dumps(good | {"messages": rng.choice([[], None, 3, "?", [{}]])}).encode(),
        json.dumps(body("?", broken)).encode(),
        json.dumps(body("?", short)).encode(),
        json.dumps(
            body("?", rng.choice(["file:///etc/passwd", "http://127.0.0.1/", "?"]))
        ).encode(),
        json.dumps(body("? " * 5000, url)).encode(),
    ]
    return rng.choice(wrong)


def faults(server: Server, urls: Sequence[str], count: int, seed: int) -> dict[str, Any]:
    """Sends requests of which half are malformed, then kills processes that decode."""
    rng = random.Random(seed)

    def request(number: int) -> dict[str, Any]:
        return body(f"What? {number}", rng.choice(urls), max_tokens=4, seed=number)

    def requests(number: int) -> list[bytes]:
        good = [json.dumps(request(n)).encode() for n in range(number // 2)]
        mixed = good + [malformed(rng, request(n)) for n in range(number - len(good))]
        rng.shuffle(mixed)
        return mixed

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: post(server.port, content), requests(count // 5)))
        before = server.resident
        found = Counter(pool.map(lambda content: post(server.port, content), requests(count)))
        after = server.resident
        # Frames that were never asked for, so that all of them are decoded.
        fresh = [
            json.dumps(request(n) | {"mm_processor_kwargs": {"num_frames": 1 + n % 8}}).encode()
            for n in range(100)
        ]
        answers = [pool.submit(post, server.port, content) for content in fresh]
        kills = 0
        for _ in range(3):
            time.sleep(0.3)
            for pid in server.workers[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
        killed = Counter(answer.result() for answer in answers)
    return {
        "requests": count,
        "statuses": dict(sorted(found.items())),
        "errors of the server": sum(
            n for status, n in found.items() if status >= 500 or not status
        ),
        "resident before": before,
        "resident after": after,
        "files left": len(list(server.temporary.iterdir())),
        "kills": kills,
        "statuses with kills": dict(sorted(killed.items())),
        "is alive": server.process.poll() is None,
    }


def table(rows: Sequence[Mapping[str, float]]) -> str:
    """Milliseconds, and the throughput as a multiple of one client's."""
    lines = [
        "| clients | requests/s | of 1 | tokens/s | first token, ms | 95 % | between tokens, ms | 95 % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    alone = rows[0]["requests a second"]
    for row in rows:
        times = [row[name] for name in ("first token", "first token, 95 %", "gap", "gap, 95 %")]
        lines.append(
            f"| {row['clients']} | {row['requests a second']:.1f} | "
            f"{row['requests a second'] / alone:.1f} | {row['tokens a second']:.0f} | "
            + " | ".join(f"{1e3 * each:.0f}" for each in times)
            + " |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of a run")
    parser.add_argument("--videos", type=pathlib.Path, required=True, help="folder of MP4 files")
    parser.add_argument("--requests", type=int, default=96, help="for each number of clients")
    parser.add_argument("--faults", type=int, default=1000, help="requests, half of them malformed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    urls = [data_url(path) for path in sorted(args.videos.glob("*.mp4"))[:8]]
    if not urls:
        parser.error(f"--videos={args.videos} has no MP4 file")
    with serve(args.workdir) as server:
        load(server.port, urls, max(CLIENTS), 2 * max(CLIENTS))  # compiles, and encodes the videos
        rows = [load(server.port, urls, clients, args.requests) for clients in CLIENTS]
        print(table(rows), flush=True)
        found = faults(server, urls, args.faults, args.seed)
    print(json.dumps(found, indent=1))
    results = {
        "command": f"python -m benchmarks.serve --requests={args.requests} --faults={args.faults}",
        "machine": machine(),
        "load": rows,
        "faults": found,
    }
    write_atomically(args.out / "serve.json", json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
