"""Several processes train as one does; killed or stopped, the same command resumes without a difference."""

from __future__ import annotations

import signal
import socket

import pytest
from broken_mixture import COUNT, make_broken_mixture
from processes import Launch, metrics, write_config

from storm_jax.files import read_lines
from storm_jax.run import Run
from storm_jax.train.stop import STOPPED

HOST = socket.gethostname()


@pytest.fixture
def arguments(small_config, shapes_folder, tmp_path):
    """train.py's, for a mixture in which 30 % of the media are broken."""

    def make(**changes) -> list[str]:
        sources, _ = make_broken_mixture(tmp_path / "data")
        config = small_config(
            data__train=sources,
            data__val=[],
            data__tokenizer=str(shapes_folder / "tokenizer"),
            data__num_workers=1,
            data__max_skip_fraction=0.5,
            train__log_every=1,
            train__eval_every=0,
            train__save_every=5,
            **{"train__steps": 30, "mesh__data": -1, **changes},
        )
        return [f"--config={write_config(config, tmp_path / 'config.py')}"]

    return make


def assert_same_run(run, other) -> None:
    """Equal losses and books at every step, and the same samples skipped."""
    assert metrics(run) == metrics(other)
    skipped, other_skipped = (
        sorted((line["where"], line["cause"]) for line in read_lines(path / "skipped.jsonl"))
        for path in (run, other)
    )
    assert skipped == other_skipped and len(skipped) > COUNT // 3


def test_two_processes_killed_and_stopped_equal_one_undisturbed(arguments, tmp_path):
    flags, workdir = arguments(), tmp_path / "two"
    undisturbed = Launch(tmp_path / "one", flags, devices=2)

    killed = Launch(workdir, flags, processes=2)
    assert killed.wait_for(8)
    killed.processes[0].kill()
    assert killed.wait(60) == [-signal.SIGKILL, 1]
    assert f"process 0 on {HOST}, which coordinates the others, has died" in killed.last_line(1)
    assert max(Run(workdir).checkpoints.steps()) >= 5

    stopped = Launch(workdir, flags, processes=2)
    assert stopped.wait_for(12)
    stopped.processes[1].terminate()
    assert stopped.wait(60) == [STOPPED, STOPPED]
    step = max(Run(workdir).checkpoints.steps())
    assert 12 <= step < 30 and step == max(metrics(workdir))
    assert f"stopped on request after step {step}, which is saved" in stopped.last_line(0)

    assert Launch(workdir, flags, processes=2).wait() == [0, 0]
    assert undisturbed.wait() == [0]
    assert_same_run(tmp_path / "one", workdir)
