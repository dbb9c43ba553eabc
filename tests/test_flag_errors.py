"""Mistakes on the command line are one line that names the argument and the remedy."""

from __future__ import annotations

import pathlib

import pytest

from storm_jax.command_line import check_config_arguments
from storm_jax.config import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
TINY = f"--config={ROOT / 'configs/tiny.py'}:stage=sft"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            [f"--config={ROOT / 'configs/tiny.py'}"],
            r"tiny.py: the stage is missing: append :stage=",
        ),
        ([f"--config={ROOT / 'configs/tiny.py'}:stage=x"], r"'stage=x' is not a stage: append"),
        ([f"--config={ROOT / 'configs/tine.py'}:stage=sft"], r"did you mean .*configs/tiny.py\?"),
        (["--config", "nowhere.py:stage=sft"], "nowhere.py does not exist"),
        ([f"--config={ROOT / 'configs/recipe.py'}"], "no function get_config"),
        ([TINY, "--config.optim.clipnorm=1"], "no field 'clipnorm', did you mean 'clip_norm'"),
        ([TINY, "--config.nothing=1"], "config has no field 'nothing'. Fields: compression, data,"),
        ([TINY, "--config.train.steps.x=1"], "config.train.steps is a value"),
        ([TINY, "--config.data.train.0.path=x"], r"write list items as data.train\[0\].path"),
        ([TINY, "--config.data.train[1].path=x"], r"config.data.train has 1 item, so \[1\] is out"),
        ([TINY, "--config.data.train[a].path=x"], r"--config.data.train\[a\].path"),
    ],
)
def test_a_wrong_argument_is_named(arguments, problem):
    with pytest.raises(ConfigError, match=problem) as raised:
        check_config_arguments(arguments)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--workdir=x"],
        [TINY, "--config.train.steps=3", "--config.data.train[0].path=x"],
        [TINY, "--config.optim.learning_rate.vision", "0.1"],
        ["--config=missing.py", TINY],  # the last one counts
    ],
)
def test_good_arguments_pass(arguments):
    check_config_arguments(arguments)


def test_errors_inside_a_configuration_file_are_raised_as_they_are(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config(arg=None):\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        check_config_arguments([f"--config={path}:stage=sft"])
