"""Damages what people bring and what a run stores, and counts how it ends.

    python -m tests.fuzz --seed=0 --media=1000 --records=5000 --state=200

Every input is used, or refused by name; every stored file is read as it was written, refused, or a part of it
is dropped with a warning. An *escape* is any other exception. *Silent* damage is a value that changed unnoticed.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile

from tests.fuzz.damage import ESCAPE, SILENT
from tests.fuzz.media import fuzz_media
from tests.fuzz.records import fuzz_records
from tests.fuzz.state import fuzz_state

FUZZERS = {"media": fuzz_media, "records": fuzz_records, "state": fuzz_state}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0, help="of all mutations")
    for name in FUZZERS:
        parser.add_argument(f"--{name}", type=int, default=0, help="number of mutations")
    args = parser.parse_args()
    escaped = silent = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, fuzz in FUZZERS.items():
            if count := getattr(args, name):
                outcomes = fuzz(args.seed, count, pathlib.Path(folder) / name)
                escaped, silent = escaped + outcomes[ESCAPE], silent + outcomes[SILENT]
                listed = ", ".join(f"{n:,} {cause}" for cause, n in outcomes.most_common() if n)
                print(f"{name}: {count:,} mutations: {listed}")
    print(f"{escaped} escapes, {silent} silent")
    sys.exit(escaped + silent > 0)


if __name__ == "__main__":
    main()
