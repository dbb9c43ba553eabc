"""Benchmarks the data pipeline against PyAV alone and against a torch DataLoader.

    python -m benchmarks.data --out=OUT

Writes H.264 clips and JPEG images as every kind of source, and measures samples and frames per second through
the whole pipeline (parsing, decoding, tokenising, packing) by number of workers. The references, measured in
the same run, are (a) PyAV or Pillow in one process, decoding and resizing the same files, times the number of
cores used, and the same in several processes at once; (b) a torch DataLoader whose workers do what (a) does.
Rounds are interleaved, and the best one counts. Also measures host memory over many samples, and the time to
open a large JSONL file. Writes data.json and data_memory.png to OUT. Needs `pip install -e '.[dev]'`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import pathlib
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import av
import numpy as np
from PIL import Image

from storm_jax.compression import Grid
from storm_jax.config import CompressionConfig, FramesConfig, SourceConfig
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.mixture import Mixture
from storm_jax.data.pipeline import batches
from storm_jax.data.plan import TrainPlan
from storm_jax.data.rows import RowShape
from storm_jax.media.reader import MediaReader
from storm_jax.media.video import write_video
from storm_jax.media.workers import WorkerPool
from storm_jax.text.bpe import train_tokenizer
from storm_jax.text.conversation import ConversationEncoder
from storm_jax.text.tokenizer import load_tokenizer

FRAMES, SIZE = 32, 448  # the paper's
BATCH = 4
WARM_UP = 8  # batches: those prefetched while the workers start, and the first use of memory
KINDS = ("json", "tar", "parquet")
QUESTION = "What happens in this video, and in which order do the things in it come and go?"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", required=True, type=pathlib.Path, help="folder for files and results"
    )
    parser.add_argument(
        "--files",
        type=int,
        default=24,
        help="number of clips; there are 20 times as many images; default 24",
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="length of a clip in seconds; default 10"
    )
    parser.add_argument(
        "--workers", default="0,1,2", help="numbers of workers, comma-separated; default 0,1,2"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds; default 3")
    parser.add_argument(
        "--samples", type=int, default=20_000, help="samples of the memory test; default 20000"
    )
    parser.add_argument(
        "--lines", type=int, default=10_000_000, help="lines of the JSONL test; default 10000000"
    )
    args = parser.parse_args()
    workers = [int(count) for count in args.workers.split(",")]
    files = Files.write(args.out / "files", args.files, args.seconds)
    results: dict[str, Any] = {
        "command": f"python -m benchmarks.data --files={args.files} --seconds={args.seconds} "
        f"--workers={args.workers} --rounds={args.rounds}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "frames": FRAMES,
        "size": SIZE,
        "speed": [],
    }
    for medium in ("video", "image"):
        results["speed"] += measure_speed(files, medium, workers, args.rounds)
        print(table(results["speed"]), flush=True)
    results["lines"] = measure_lines(args.out / "files", args.lines)
    print(results["lines"], flush=True)
    results["memory"] = measure_memory(files, args.samples, max(workers))
    draw_memory(results["memory"], args.out / "data_memory.png")
    (args.out / "data.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"results: {args.out}/data.json, {args.out}/data_memory.png")


# Files.


@dataclasses.dataclass(frozen=True)
class Files:
    """The same clips and images as every kind of source."""

    root: pathlib.Path
    videos: list[pathlib.Path]
    images: list[pathlib.Path]

    @classmethod
    def write(cls, root: pathlib.Path, count: int, seconds: float) -> Files:
        rng = np.random.default_rng(0)
        (root / "media").mkdir(parents=True, exist_ok=True)
        found = cls(
            root,
            [root / f"media/{i:04}.mp4" for i in range(count)],
            [root / f"media/{i:05}.jpg" for i in range(20 * count)],
        )
        for path in found.videos:
            if not path.exists():
                write_video(path, _moving(rng, int(seconds * 25), 360, 640), 25)
        for path in found.images:
            if not path.exists():
                Image.fromarray(_moving(rng, 1, 480, 640)[0]).save(path, quality=90)
        for medium in ("video", "image"):
            found._write_sources(medium)
        turns = [QUESTION, "A square moves from left to right."]
        train_tokenizer(turns * 10, 400).save_pretrained(root / "tokenizer")
        return found

    def of(self, medium: str) -> list[pathlib.Path]:
        return self.videos if medium == "video" else self.images

    def _write_sources(self, medium: str) -> None:
        import pyarrow
        import pyarrow.parquet

        paths = self.of(medium)
        names = [path.name for path in paths]
        (self.root / f"{medium}.jsonl").write_text(
            "\n".join(json.dumps(_record(medium, f"media/{name}")) for name in names)
        )
        for kind in ("tar", "parquet"):
            (self.root / f"{medium}_{kind}").mkdir(exist_ok=True)
        with tarfile.open(self.root / f"{medium}_tar/0.tar", "w") as shard:
            for path in paths:
                text = json.dumps(_record(medium, path.name)).encode()
                for name, data in ((f"{path.stem}.json", text), (path.name, path.read_bytes())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    shard.addfile(info, io.BytesIO(data))
        rows = [_record(medium, {"bytes": path.read_bytes(), "path": path.name}) for path in paths]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows),
            self.root / f"{medium}_parquet/0.parquet",
            row_group_size=100,
        )

    def source(self, medium: str, kind: str) -> SourceConfig:
        name = f"{medium}.jsonl" if kind == "json" else f"{medium}_{kind}"
        return SourceConfig(name=kind, path=str(self.root / name))


def _record(medium: str, value: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": f"<{medium}>\n{QUESTION}"},
        {"from": "gpt", "value": "A square moves from left to right."},
    ]
    return {medium: value, "conversations": turns}


def _moving(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Squares over a textured background, uint8 [count, H, W, 3]."""
    small = rng.integers(0, 255, (height // 16, width // 16, 3))
    background = np.kron(small, np.ones((16, 16, 1))).astype(np.uint8)
    frames = np.repeat(background[None], count, 0)
    for i in range(count):
        left = (7 * i) % (width - 40)
        frames[i, 60:100, left : left + 40] = (i * 5) % 255
    return frames


# Our pipeline.


def open_files(
    files: Files, source: SourceConfig, pool: WorkerPool, size: int, frames: int
) -> Mixture:
    compression = CompressionConfig(num_frames=frames, temporal_pool=4, spatial_pool=2)
    text = ConversationEncoder(load_tokenizer(files.root / "tokenizer"), "")
    return Mixture(
        [source],
        SampleEncoder(
            text=text, grid=Grid.square(8), compression=compression, frames=FramesConfig()
        ),
        [
            RowShape(
                tokens=4096,
                frames=64,
                image_size=size,
                grid=Grid.square(8),
                compressions=(compression,),
            )
        ],
        seed=0,
        index_dir="",
        max_skip_fraction=0.0,
        pool=pool,
    )


def run_ours(files: Files, source: SourceConfig, workers: int, samples: int) -> tuple[float, int]:
    """Reads at least `samples` samples; returns the seconds, without start-up, and the number read."""
    with WorkerPool(workers) as pool:
        mixture = open_files(files, source, pool, SIZE, FRAMES)
        reader = MediaReader(pool, SIZE, FramesConfig())
        stream = batches(mixture, TrainPlan(mixture, BATCH), range(1_000_000), range(BATCH), reader)
        for _ in range(WARM_UP):
            next(stream)
        began, done = time.perf_counter(), 0
        while done < samples:
            batch = next(stream)
            assert not batch.skips
            done += len(batch.outcomes)
        return time.perf_counter() - began, done


# References.


def decode_plain(path: str) -> np.ndarray:
    """Reads a file with PyAV or Pillow alone into the frames that training sees, uint8 [T, H, W, 3].

    Frames are picked by number, which is correct for these files.
    """
    if path.endswith(".jpg"):
        image = Image.open(path).convert("RGB")
        return np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))[None]
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = set(np.linspace(0, stream.frames - 1, FRAMES).round().astype(int).tolist())
        reformat = av.video.reformatter.VideoReformatter().reformat
        return np.stack(
            [
                reformat(frame, SIZE, SIZE, "rgb24", interpolation="BICUBIC").to_ndarray()
                for number, frame in enumerate(container.decode(stream))
                if number in wanted
            ]
        )


def decode_all(paths: Sequence[str], samples: int) -> float:
    """Returns the seconds to decode `samples` files in this process."""
    for path in paths[:3]:
        decode_plain(path)
    began = time.perf_counter()
    for i in range(samples):
        decode_plain(paths[i % len(paths)])
    return time.perf_counter() - began


def run_alone(paths: Sequence[pathlib.Path], processes: int, samples: int) -> tuple[float, int]:
    """Measures (a) in one process, or in several at once for the combined speed of the cores."""
    names, each = [str(path) for path in paths], samples // processes
    if processes == 1:
        return decode_all(names, each), each
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        list(pool.map(decode_all, [names] * processes, [1] * processes))  # start them
        seconds = list(pool.map(decode_all, [names] * processes, [each] * processes))
    return max(seconds), each * processes


class _TorchFiles:
    """A torch map-style dataset that cycles through the files."""

    def __init__(self, paths: Sequence[pathlib.Path]):
        self.paths = [str(path) for path in paths]

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Any:
        import torch

        return torch.from_numpy(decode_plain(self.paths[index % len(self.paths)]))


def run_torch(paths: Sequence[pathlib.Path], workers: int, samples: int) -> tuple[float, int]:
    import torch

    loader: Any = torch.utils.data.DataLoader(
        _TorchFiles(paths),  # type: ignore[arg-type]
        batch_size=BATCH,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    stream = iter(loader)
    for _ in range(WARM_UP):
        next(stream)
    began, done = time.perf_counter(), 0
    while done < samples:
        done += len(next(stream))
    return time.perf_counter() - began, done


def measure_speed(
    files: Files, medium: str, workers: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    paths = files.of(medium)
    samples = 4 * len(paths) if medium == "video" else len(paths)
    jobs: dict[tuple[str, int], Callable[[], tuple[float, int]]] = {
        ("alone", count): functools.partial(run_alone, paths, count, samples)
        for count in sorted({1, *workers} - {0})
    }
    for count in workers:
        jobs["torch", count] = functools.partial(run_torch, paths, count, samples)
        for kind in KINDS:
            source = files.source(medium, kind)
            jobs[kind, count] = functools.partial(run_ours, files, source, count, samples)
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in jobs}
    for _ in range(rounds):
        for key, job in jobs.items():
            seconds, done = job()
            rates[key].append(done / seconds)
    alone, cores = max(rates["alone", 1]), os.cpu_count() or 1
    found = []
    for (name, count), measured in rates.items():
        best = max(measured)
        used = max(1, min(count, cores))
        found.append(
            {
                "medium": medium,
                "what": name,
                "workers": count,
                "samples_per_second": best,
                "frames_per_second": best * (FRAMES if medium == "video" else 1),
                "of_alone_times_cores": best / (alone * used),
                "spread": (max(measured) - min(measured)) / best,
            }
        )
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| medium | what | workers | samples/s | frames/s | of (a) times cores | times (b) | spread |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    torch = {(r["medium"], r["workers"]): r for r in rows if r["what"] == "torch"}
    for row in rows:
        reference = torch.get((row["medium"], row["workers"]))
        ratio = (
            f"{row['samples_per_second'] / reference['samples_per_second']:.2f}"
            if reference
            else "-"
        )
        lines.append(
            f"| {row['medium']} | {row['what']} | {row['workers']} | {row['samples_per_second']:.1f} | "
            f"{row['frames_per_second']:.0f} | {row['of_alone_times_cores']:.0%} | {ratio} | "
            f"{row['spread']:.0%} |"
        )
    return "\n".join(lines)


# Memory.


def resident(pid: int | str = "self") -> float:
    """Returns a process's private memory in MB, excluding memory shared with others."""
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty"):
            return int(line.split()[1]) / 1024
    return 0.0


def measure_memory(files: Files, samples: int, workers: int) -> list[tuple[int, float, float]]:
    """Returns (samples read, MB of the main process, MB of all workers) while reading small clips."""
    folder = files.root / "small"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    records = []
    for i in range(64):
        if not (folder / f"{i}.mp4").exists():
            write_video(folder / f"{i}.mp4", _moving(rng, 16, 128, 128), 8)
        records.append(_record("video", f"{i}.mp4"))
    (folder / "small.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    found = []
    with WorkerPool(workers) as pool:
        source = SourceConfig(name="small", path=str(folder / "small.jsonl"))
        mixture = open_files(files, source, pool, 64, 8)
        plan = TrainPlan(mixture, BATCH)
        reader = MediaReader(pool, 64, FramesConfig())
        done = 0
        for step, batch in enumerate(batches(mixture, plan, range(10**9), range(BATCH), reader)):
            done += len(batch.outcomes)
            plan.forget(step)
            if step % 20 == 0 or done >= samples:
                children = [int(pid) for pid in _children()]
                found.append((done, resident(), sum(resident(pid) for pid in children)))
            if done >= samples:
                break
    return found


def _children() -> list[str]:
    tasks = pathlib.Path("/proc/self/task").glob("*/children")
    return [pid for task in tasks for pid in task.read_text().split()]


def draw_memory(rows: Sequence[tuple[int, float, float]], path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    done, main, children = zip(*rows, strict=True)
    axis.plot(done, main, label="training process")
    axis.plot(done, children, label="all workers")
    axis.set(xlabel="samples", ylabel="private memory (MB)", ylim=(0, None))
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


OPENER = """
import sys, time
from storm_jax.config import SourceConfig
from storm_jax.data.sources import open_source
from benchmarks.data import resident
before, began = resident(), time.perf_counter()
source = open_source(SourceConfig(name="lines", path=sys.argv[1]))
source.sample(len(source) - 1)
print(len(source), time.perf_counter() - began, resident() - before)
"""


def measure_lines(folder: pathlib.Path, count: int) -> dict[str, float]:
    """Returns seconds and MB to open a JSONL file and read its last sample, the first and second time."""
    path = folder / f"lines_{count}.jsonl"
    if not path.exists():
        line = json.dumps(_record("video", "media/0000.mp4")) + "\n"
        with path.open("w") as file:
            for start in range(0, count, 10_000):
                file.write(line * min(10_000, count - start))
    found: dict[str, float] = {"lines": count, "bytes": path.stat().st_size}
    for name in ("first", "again"):
        done = subprocess.run(
            [sys.executable, "-c", OPENER, str(path)], check=True, capture_output=True, text=True
        )
        lines, seconds, memory = done.stdout.split()
        assert int(lines) == count
        found |= {f"{name}_seconds": float(seconds), f"{name}_mb": float(memory)}
    path.unlink()
    return found


if __name__ == "__main__":
    main()
