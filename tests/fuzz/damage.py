"""Random faults in bytes, and what became of them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

import numpy as np

from storm_jax.checkpoints import RunError
from storm_jax.config import ConfigError
from storm_jax.evals.benchmark import BenchmarkError
from storm_jax.media.media import MediaError
from storm_jax.text.sample import SampleError

ESCAPE = "ESCAPE"
SILENT = "SILENT"


def damage_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """One to eight faults, anywhere or in the header."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        limit = min(len(found), 400) if rng.random() < 0.5 else len(found)
        at = int(rng.integers(max(1, limit)))
        size = int(rng.integers(1, 40))
        match rng.integers(5):
            case 0:
                found[at : at + 1] = bytes([int(rng.integers(256))])
            case 1:
                found[at : at + size] = bytes(len(found[at : at + size]))
            case 2:
                del found[at : at + size]
            case 3:
                found[at:at] = found[at : at + size]
            case 4:
                del found[max(1, at) :]
    return bytes(found)


def outcome_of(call: Callable[[], str], name: str) -> str:
    """What the call returns, the cause of its refusal, or an escape, which is printed under `name`."""
    try:
        return call()
    except (SampleError, MediaError) as error:
        return error.cause
    except (ConfigError, RunError, BenchmarkError):
        return "refused"
    except Exception:
        print(f"{ESCAPE}: {name}\n{traceback.format_exc()}", file=sys.stderr)
        return ESCAPE
