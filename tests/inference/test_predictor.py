"""A loaded run answers alike alone and in a batch, and errors affect only their sample."""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np
import pytest

import storm_jax
from storm_jax.config import ConfigError
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.inference.generate import Sampling
from storm_jax.inference.programs import Programs
from storm_jax.media.media import Media
from storm_jax.media.reader import MediaReader
from storm_jax.run import Run, RunError
from storm_jax.text.sample import Sample, Turn

SHORT = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def storm(trained_run):
    return storm_jax.load(trained_run)


@pytest.fixture
def video(shapes_folder):
    return next((shapes_folder / "media/test").glob("*.mp4"))


def questions_of(folder) -> list[Sample]:
    """The test questions of the built-in task as samples."""
    benchmark = BENCHMARKS["shapes"]
    prompt = benchmark.prompts["trained"]
    return [prompt(q) for q in benchmark.questions(folder, "test")]


def test_answers_do_not_depend_on_the_batch(storm, shapes_folder):
    samples = questions_of(shapes_folder)[:6]
    together = dict(storm.predict(samples, batch_size=4, sampling=SHORT))
    assert sorted(together) == list(range(6))
    for index, sample in enumerate(samples):
        [(_, alone)] = storm.predict([sample], batch_size=4, sampling=SHORT)
        assert alone.text == together[index].text
        assert alone.visual_tokens == together[index].visual_tokens > 0


def test_compression_changes_without_new_weights(storm, shapes_folder):
    video = next((shapes_folder / "media/test").glob("*.mp4"))
    image = next((shapes_folder / "media/test").glob("*.png"))
    for changes in ({"temporal_sample": 2}, {"temporal_pool": 4}, {"spatial_pool": 2}):
        compression = dataclasses.replace(storm.compression, **changes)
        assert isinstance(
            storm.answer(video, "What?", compression=compression, sampling=SHORT), str
        )
        assert isinstance(
            storm.answer(image, "What?", compression=compression, sampling=SHORT), str
        )


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(storm, tmp_path):
    with pytest.raises(ValueError, match=r"nothing.mp4 is missing"):
        storm.answer(tmp_path / "nothing.mp4", "What?")


def test_placeholders_in_the_question_are_ignored(storm, shapes_folder):
    video = next((shapes_folder / "media/test").glob("*.mp4"))
    plain, video_word, image_word = (
        storm.answer(video, question, sampling=SHORT)
        for question in ("What?", "<video>What?", "<image>What?")
    )
    assert video_word == image_word == plain


def test_media_are_decoded_and_encoded_once_for_all_questions(storm, shapes_folder, monkeypatch):
    """Nine questions about three videos, one of which is broken: two tables serve six answers."""
    videos = sorted((shapes_folder / "media/test").glob("*.mp4"))[:2]
    paths = [*videos, shapes_folder / "nothing.mp4"]
    samples = [
        Sample(
            id=f"{i}",
            turns=(Turn("user", f"<video>\nWhat? {i}"),),
            media=(Media.file("video", path),),
            extra={},
        )
        for i in range(3)
        for path in paths
    ]
    read, encoded = [], []
    reads = MediaReader.read
    monkeypatch.setattr(
        MediaReader,
        "read",
        lambda self, medium, *rest: read.append(medium) or reads(self, medium, *rest),
    )
    original = Programs.encode
    monkeypatch.setattr(
        Programs,
        "encode",
        lambda self, rows, *rest: (
            encoded.append(rows["frame_clip"].max(axis=1)) or original(self, rows, *rest)
        ),
    )
    answers = dict(storm.predict(samples, batch_size=4, sampling=SHORT))
    assert sorted(answers) == list(range(9))
    assert sorted(medium.path for medium in read) == sorted(paths)
    assert sum(int((clips > 0).sum()) for clips in encoded) == 2
    for index, sample in enumerate(samples):
        failed = sample.media[0].path == paths[2]
        assert bool(answers[index].error) == failed
        assert answers[index].cause == ("missing" if failed else "")
        if not failed:
            [(_, alone)] = storm.predict([sample], batch_size=4, sampling=SHORT)
            assert alone.text == answers[index].text


def test_the_likeliest_choice_is_the_argmax_among_the_rows_own(storm, shapes_folder):
    samples = questions_of(shapes_folder)[:4]
    letters = "ABCDEFGH"
    order = [
        next(iter(dict(storm.predict([s], choices=[letters], batch_size=4)).values())).text
        for s in samples
    ]
    without = [letters.replace(best, "") for best in order]
    together = dict(storm.predict(samples, choices=[letters] * 4, batch_size=4))
    assert [together[i].text for i in range(4)] == order
    second = dict(storm.predict(samples, choices=without, batch_size=4))
    assert all(second[i].text in without[i] for i in range(4))
    with pytest.raises(ValueError, match=r"'zebras' is . tokens"):
        list(storm.predict(samples, choices=[["zebras"]] * 4))


def test_a_question_may_depend_on_the_frames_and_open_its_answer(storm, shapes_folder):
    """`encode` and `ask` are separate calls, and `predict` is their composition."""
    video = Media.file("video", next((shapes_folder / "media/test").glob("*.mp4")))
    missing = Media.file("video", shapes_folder / "nothing.mp4")
    (batch,) = storm.encode([(video,), (missing,)], batch_size=4, preview_frames=3)
    scene, unread = batch.scenes
    (times,) = scene.times
    assert len(times) == 8 and times[0] == 0 and (np.diff(times) > 0).all()
    (preview,) = scene.previews
    size = storm.config.model.vision.image_size
    assert preview.frames.shape == (3, size, size, 3)
    np.testing.assert_array_equal(preview.times, times[[0, 4, 7]])
    assert unread.error.cause == "missing" and unread.times == unread.previews == ()
    asked = Sample(
        id="1",
        turns=(Turn("user", f"<video>\nWhat is at {times[3]:.2f} s?"),),
        media=(video,),
        extra={},
        opening="Best option: (",
    )
    about_missing = dataclasses.replace(asked, media=(missing,))
    answers = dict(storm.ask(batch, [about_missing, asked], sampling=SHORT))
    assert answers[0].cause == "missing" and answers[0].text == ""
    assert answers[1].error == "" and answers[1].seconds > 0
    assert answers[1].visual_tokens == scene.visual_tokens > 0
    [(_, predicted)] = storm.predict([asked], batch_size=4, sampling=SHORT)
    assert predicted.text == answers[1].text


@pytest.mark.parametrize("warms_up", [False, True])
def test_first_runs_of_a_program_are_not_timed_if_it_warms_up(storm, monkeypatch, warms_up):
    """Answers to a user run each program once; those whose time is reported run it untimed before."""
    calls = []

    class Slow:
        def lower(self, *_):
            return self

        def compile(self):
            return self

        def __call__(self, params, x):
            calls.append(len(calls))
            time.sleep(0.2 if len(calls) == 1 else 0)
            return x

    monkeypatch.setattr(jax, "jit", lambda function, **_: Slow())
    monkeypatch.setattr(storm._programs, "_warms_up", warms_up)
    inputs = (jax.numpy.zeros(1),)
    _, seconds = storm._programs._call(lambda params, x: x, ("slow", warms_up), inputs)
    assert (calls, seconds < 0.1) == (([0, 1], True) if warms_up else ([0], False))


def test_samples_that_do_not_fit_their_media_leave_the_others_alone(storm, shapes_folder):
    video = (Media.file("video", next((shapes_folder / "media/test").glob("*.mp4"))),)
    texts = ["<video>\nWhat?", "<video><video>\nWhat?", "What?", None]
    samples = [
        Sample(
            id=str(i),
            turns=(Turn("user", text),) if text is not None else (),
            media=video,
            extra={},
        )
        for i, text in enumerate(texts)
    ]
    answers = dict(storm.predict(samples, batch_size=4, sampling=SHORT))
    assert answers[0].error == ""
    assert [answers[i].cause for i in (1, 2, 3)] == ["placeholder"] * 3
    assert "1 turns with 2 placeholders for 1 media" in answers[1].error


def test_batches_are_smaller_where_there_are_many_visual_tokens(storm):
    assert storm._batch_size(None, 0) == 32
    assert storm._batch_size(None, 2**14) == 32  # 8 rows a device, of which there are 8
    assert storm._batch_size(5, 2**14) == 8
    assert storm._batch_size(None, 2**17) == 8


def test_what_exceeds_the_decoders_positions_is_refused_before_anything_runs(
    storm, video, monkeypatch
):
    monkeypatch.setattr(storm._programs, "encode", None)
    decoder = dataclasses.replace(storm.config.model.decoder, max_positions=3)
    with monkeypatch.context() as patch:
        small = dataclasses.replace(storm.config.model, decoder=decoder)
        patch.setattr(storm, "config", dataclasses.replace(storm.config, model=small))
        with pytest.raises(ValueError, match=r"visual tokens exceed the decoder's 3 positions"):
            storm.watch(video)


def test_a_question_longer_than_the_decoders_positions_is_refused(storm, video):
    watched = storm.watch(video)
    with pytest.raises(ValueError, match=r"exceed the decoder's 32,768 positions .*: shorten"):
        watched.answer("why " * 80_000, sampling=SHORT)
    with pytest.raises(ValueError, match=r"and up to 40,000 of the answer exceed"):
        watched.answer("Why?", sampling=Sampling(40_000))
    assert isinstance(watched.answer("Why?", sampling=SHORT), str)


def test_other_temperatures_and_token_limits_compile_nothing(storm, video):
    watched = storm.watch(video)
    watched.answer("Why?", sampling=SHORT)
    programs = storm.num_programs
    longest = watched.answer("Why?", sampling=Sampling(64, temperature=0.7, top_p=0.9), seed=1)
    for limit in (1, 5, 33):
        cut = watched.answer("Why?", sampling=Sampling(limit, temperature=0.7, top_p=0.9), seed=1)
        assert longest.startswith(cut)
    assert storm.num_programs == programs


def test_no_samples_have_no_predictions(storm):
    assert list(storm.predict([])) == []


def test_a_missing_step_or_run_is_named(trained_run, tmp_path):
    with pytest.raises(RunError, match=r"no checkpoint of step 7; it has \[2\]"):
        storm_jax.load(trained_run, step=7)
    with pytest.raises(ConfigError, match="is not a run"):
        storm_jax.load(tmp_path)
    assert Run(trained_run).checkpoints.resolve(None) == 2
