"""Several processes train as one does; killed or stopped, the same command resumes without a difference."""

from __future__ import annotations

import signal
import socket
import subprocess

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

    sources, _ = make_broken_mixture(tmp_path / "data")

    def make(**changes) -> list[str]:
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


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_equal_one_undisturbed(arguments, tmp_path):
    flags = arguments(train__steps=12)
    undisturbed = Launch(tmp_path / "one", flags, devices=2)
    launch = Launch(tmp_path / "two", flags, processes=2)
    assert launch.wait_for(7)
    launch.processes[0].kill()
    assert launch.wait(60) == [-signal.SIGKILL, 1]
    assert f"process 0 on {HOST}, which coordinates the others, has died" in launch.last_line(1)
    assert Launch(tmp_path / "two", flags, processes=2).wait() == [0, 0]
    assert undisturbed.wait() == [0]
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")


@pytest.mark.slow
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
    assert Run(workdir).checkpoints.steps() == [25, 30]
    assert_same_run(tmp_path / "one", workdir)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_is_named_within_a_minute(victim, arguments, tmp_path):
    launch = Launch(tmp_path / "run", arguments(), processes=2)
    assert launch.wait_for(2)
    stopped, other = launch.processes[victim], launch.processes[1 - victim]
    stopped.send_signal(signal.SIGSTOP)
    try:
        assert other.wait(60) == 1
    finally:
        launch.kill()
    assert f"process {victim} on {HOST}" in launch.last_line(1 - victim)


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_is_the_start_of_one_and_two(arguments, tmp_path):
    """The rows are the same, and the losses agree within 1e-5: sums are in another order."""
    for count in (4, 2, 1):  # of processes, for steps 1 to 5, 6 to 10 and 11 to 15
        last = 5 * {4: 1, 2: 2, 1: 3}[count]
        flags = arguments(train__steps=15)
        launch = Launch(tmp_path / "run", flags, processes=count)
        if last < 15:
            assert launch.wait_for(last)
            launch.processes[0].terminate()
            assert launch.wait() == [STOPPED] * count
        else:
            assert launch.wait() == [0]
    assert Launch(tmp_path / "one", flags).wait() == [0]
    found, wanted = metrics(tmp_path / "run"), metrics(tmp_path / "one")
    for step, line in wanted.items():
        assert found[step]["loss"] == pytest.approx(line["loss"], rel=1e-5)
        books = {name: value for name, value in line.items() if name.startswith("data/")}
        assert books.items() <= found[step].items()


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_ends_all_processes_and_a_later_start_resumes(
    arguments, tmp_path
):
    flags, run = arguments(), Run(tmp_path / "two")
    launch = Launch(run.path, flags, processes=2)
    assert launch.wait_for(7)
    saved = run.checkpoints.path.rename(tmp_path / "away")
    run.checkpoints.path.write_text("in the way")
    assert launch.wait(120) == [1, 1]
    assert "could not be saved (Not a directory), nor could the 2 before it" in launch.last_line(0)
    run.checkpoints.path.unlink()
    saved.rename(run.checkpoints.path)
    assert Launch(run.path, flags, processes=2).wait() == [0, 0]
    assert Launch(tmp_path / "one", flags, devices=2).wait() == [0]
    assert_same_run(tmp_path / "one", run.path)


@pytest.mark.slow
def test_a_disk_that_fills_while_two_processes_write_keeps_the_last_good_checkpoint(
    arguments, tmp_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        launch = Launch(disk / "run", arguments(train__keep_last=9), processes=2)
        statuses, steps = launch.wait(200), Run(disk / "run").checkpoints.steps()
        assert statuses == [1, 1] and steps == [5, 10, 15][: len(steps)] != []
        assert "(No space left on device)" in launch.last_line(0)
        left = {path.name for path in (disk / "run/checkpoints").iterdir()}
        assert left == {str(step) for step in steps}
        Run(disk / "run").checkpoints.verify(steps[-1])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_meshes_across_processes_equal_one_process(arguments, tmp_path):
    """Model and tokens are split between processes, which then read the same rows."""
    for name, mesh in {
        "fsdp": {"mesh__data": 1, "mesh__fsdp": 4},
        "tensor": {"mesh__data": 2, "mesh__tensor": 2},
        "context": {"mesh__data": 1, "mesh__fsdp": 2, "mesh__context": 2},
    }.items():
        flags = arguments(train__steps=6, **mesh)
        one = Launch(tmp_path / f"{name}_one", flags, devices=4)
        assert one.wait() == [0]
        assert Launch(tmp_path / name, flags, processes=4).wait() == [0] * 4
        found, wanted = metrics(tmp_path / name), metrics(tmp_path / f"{name}_one")
        assert found[6].keys() == wanted[6].keys() and len(wanted) == 6
        for step, line in wanted.items():  # sums over processes are in another order
            assert found[step] == pytest.approx(line, rel=1e-5)
