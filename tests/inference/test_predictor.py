"""A loaded run answers alone as in a batch, and errors stay with their sample."""

from __future__ import annotations

import dataclasses

import pytest

import storm_jax
from storm_jax.config import ConfigError
from storm_jax.evals import shapes
from storm_jax.run import Run, RunError


@pytest.fixture(scope="module")
def storm(trained_run):
    return storm_jax.load(trained_run)


def test_answers_do_not_depend_on_the_batch(storm, shapes_folder):
    samples = [question.sample for question in shapes.load(shapes_folder).questions][:6]
    together = dict(storm.predict(samples, batch_size=4))
    assert sorted(together) == list(range(6))
    for index, sample in enumerate(samples):
        [(_, alone)] = storm.predict([sample], batch_size=4)
        assert alone.text == together[index].text
        assert len(alone.clips) == 1


def test_compression_changes_without_new_weights(storm, shapes_folder):
    video = next((shapes_folder / "media/test").glob("*.mp4"))
    image = next((shapes_folder / "media/test").glob("*.png"))
    for changes in ({"temporal_sample": 2}, {"temporal_pool": 4}, {"spatial_pool": 2}):
        compression = dataclasses.replace(storm.compression, **changes)
        assert isinstance(storm.answer(video, "What?", compression=compression), str)
        assert isinstance(storm.answer(image, "What?", compression=compression), str)


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(storm, tmp_path):
    with pytest.raises(ValueError, match=r"nothing.mp4 is missing"):
        storm.answer(tmp_path / "nothing.mp4", "What?")


def test_a_placeholder_in_the_question_stands_for_nothing_more(storm, shapes_folder):
    video = next((shapes_folder / "media/test").glob("*.mp4"))
    plain = storm.answer(video, "What?")
    assert storm.answer(video, "<video>What?") == storm.answer(video, "<image>What?") == plain


def test_no_samples_give_no_answers(storm):
    assert list(storm.predict([])) == []


def test_a_missing_step_or_run_is_named(trained_run, tmp_path):
    with pytest.raises(RunError, match=r"no checkpoint of step 7; steps here: \[2\]"):
        storm_jax.load(trained_run, step=7)
    with pytest.raises(ConfigError, match="is not a run"):
        storm_jax.load(tmp_path)
    assert Run(trained_run).checkpoint_step() == 2
