"""The launch files start what they say."""

from __future__ import annotations

import os
import pathlib
import subprocess

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_and_executable(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_job_sets_start_train_with_time_to_save(file):
    pods = yaml.safe_load(file.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert pods["parallelism"] == pods["completions"]
    pod = pods["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-u", "train.py"]
    assert pod["terminationGracePeriodSeconds"] >= 120


def test_ssh_starts_a_numbered_process_on_every_host_and_returns_the_highest_status(tmp_path):
    """`ssh HOST COMMAND` and `python` are replaced by scripts on the path."""
    (tmp_path / "ssh").write_text('#!/bin/bash\nHOST_NAME=$1 bash -c "$2"\n')
    (tmp_path / "python").write_text(
        '#!/bin/bash\necho "$HOST_NAME $*"\n[[ "$*" == *process_id=1* ]] && exit 75\nexit 0\n'
    )
    for name in ("ssh", "python"):
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [LAUNCH / "ssh.sh", "--config=a.py:stage=sft", "--workdir=/shared/a run"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTS": "one two"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    start = "-u train.py --coordinator_address=one:12355 --num_processes=2"
    rest = "--config=a.py:stage=sft --workdir=/shared/a run"
    assert sorted(done.stdout.splitlines()) == [
        f"one {start} --process_id=0 {rest}",
        f"two {start} --process_id=1 {rest}",
    ]
