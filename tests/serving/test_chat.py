"""The API as OpenAI's client sees it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import pathlib
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from PIL import Image
from serving.conftest import LIMITS, MODEL, ask, data_url, image, video, wait_for

from storm_jax.inference.generate import Sampling
from storm_jax.inference.programs import Programs
from storm_jax.media.media import Media
from storm_jax.serve import app as app_lib
from storm_jax.serve.app import make_app
from storm_jax.text.sample import Sample, Turn

NEW = 12


@pytest.fixture
def chat(served):
    """Asks the server; `max_completion_tokens` is NEW."""
    create = served.client.chat.completions.create

    def complete(messages, **options):
        options = {"model": MODEL, "max_completion_tokens": NEW} | options
        return create(messages=messages, **options)

    return complete


def text_of(completion) -> str:
    return completion.choices[0].message.content


def png(color: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (color, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_answer_is_the_predictors(chat, served, clip):
    completion = chat(ask("What?", video(clip.read_bytes())))
    assert text_of(completion) == served.predictor.answer(clip, "What?", sampling=Sampling(NEW))
    assert completion.model == MODEL and completion.object == "chat.completion"
    assert completion.choices[0].finish_reason in ("stop", "length")
    usage, (medium,) = completion.usage, completion.storm["media"]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens <= NEW
    visual = usage.prompt_tokens_details.multimodal_tokens
    assert medium["visual_tokens"] == visual == 4 * medium["groups"] > 0
    assert medium["frames"] == len(medium["times"]) == 8 and medium["times"][0] == 0


def test_a_stream_is_the_same_answer_in_pieces(chat, clip):
    messages = ask("What?", video(clip.read_bytes()))
    options = {"temperature": 1.0, "seed": 3, "max_completion_tokens": 24}
    whole = chat(messages, **options)
    chunks = list(chat(messages, **options, stream=True, stream_options={"include_usage": True}))
    *pieces, last, usage = chunks
    deltas = [chunk.choices[0].delta for chunk in pieces]
    assert deltas[0].role == "assistant" and deltas[0].content == ""
    assert "".join(delta.content for delta in deltas) == text_of(whole)
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.choices == [] and usage.usage == whole.usage
    assert pieces[0].storm == whole.storm
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_turns_media_and_an_own_system_text(chat, served, clip):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image(png()), {"type": "text", "text": "And <video>?"}]},
        {"role": "assistant", "content": "red"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Compare "}, video(clip.read_bytes())],
        },
    ]
    media = (
        Media(kind="image", name="image", data=png()),
        Media.file("video", clip),
    )
    turns = (
        Turn("system", "Be brief."),
        Turn("user", "<image>\nAnd ?"),
        Turn("assistant", "red"),
        Turn("user", "Compare <video>\n"),
    )
    sample = Sample(id="1", turns=turns, media=media, extra={})
    [(_, expected)] = served.predictor.predict([sample], sampling=Sampling(NEW))
    assert not expected.error
    assert text_of(chat(messages)) == expected.text


def test_text_alone(chat):
    assert isinstance(text_of(chat([{"role": "user", "content": "Hello"}])), str)


def test_a_second_question_decodes_and_encodes_nothing(chat, clip, monkeypatch):
    message = video(clip.read_bytes(), num_frames=5)
    first = text_of(chat(ask("What?", message)))
    monkeypatch.setattr(Programs, "encode", None)
    assert text_of(chat(ask("What?", message))) == first
    assert isinstance(text_of(chat(ask("And now?", message))), str)


def test_frame_settings_take_effect_and_are_lowered_to_the_limits(chat, clip):
    content = clip.read_bytes()

    def seen(settings: dict, **extra):
        completion = chat(ask("What?", video(content, **settings)), extra_body=extra)
        (medium,) = completion.storm["media"]
        return medium["frames"], completion.storm["clamped"]

    assert seen({"num_frames": 3}) == (3, [])
    assert seen({"max_frames": 2}) == (2, [])
    assert seen({"num_frames": 99}) == (8, ["messages[0].content[0].video_url.num_frames"])
    assert seen({}, media_io_kwargs={"video": {"num_frames": 4}}) == (4, [])
    assert seen({"fps": 2})[0] == seen({}, mm_processor_kwargs={"fps": 2})[0] < 8
    pooled = chat(
        ask("What?", video(content)), extra_body={"storm": {"temporal_pool": 8, "spatial_pool": 2}}
    )
    assert pooled.storm["media"][0]["groups"] == 1
    assert pooled.usage.prompt_tokens_details.multimodal_tokens == 1
    assert chat(ask("What?"), max_completion_tokens=500).storm["clamped"] == [
        "max_completion_tokens"
    ]


def test_frames_may_be_sent_as_a_list(chat):
    frames = ",".join(base64.b64encode(_jpeg(shade)).decode() for shade in range(0, 200, 20))
    part = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}", "fps": 2}}
    (medium,) = chat(ask("What?", part)).storm["media"]
    assert medium["frames"] == 8 and medium["times"][-1] == 4.5


def _jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_stop_texts_end_an_answer(chat, clip):
    messages = ask("What?", video(clip.read_bytes()))
    options = {"temperature": 1.0, "seed": 3, "max_completion_tokens": 24}
    whole = text_of(chat(messages, **options))
    assert len(whole) > 8
    stop = whole[5:8]
    stopped = chat(messages, **options, stop=[stop, "\0"])
    assert text_of(stopped) == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    chunks = chat(messages, **options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(stopped)


REFUSED = {
    "n": ({"n": 2}, "n", "n=2 is not supported"),
    "logprobs": ({"logprobs": True}, "logprobs", "logprobs=True is not supported"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
    "response_format": ({"response_format": {"type": "json_object"}}, "response_format", "not"),
    "temperature": ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    "nan": ({"temperature": float("inf")}, None, "JSON"),
    "top_p": ({"top_p": 0}, "top_p", "greater than 0"),
    "unknown": ({"extra_body": {"frames": 3}}, "frames", "not a field that this server knows"),
    "nested": (
        {"extra_body": {"media_io_kwargs": {"video": {"frames_indices": [0]}}}},
        "media_io_kwargs.video.frames_indices",
        "not a field",
    ),
    "no sampling": (
        {"extra_body": {"mm_processor_kwargs": {"do_sample_frames": False}}},
        "mm_processor_kwargs.do_sample_frames",
        "True",
    ),
    "all frames": (
        {"extra_body": {"media_io_kwargs": {"video": {"num_frames": -1}}}},
        "media_io_kwargs.video.num_frames",
        "greater than or equal to 1",
    ),
    "no messages": ({"messages": []}, "messages", "at least 1 item"),
    "last turn": (
        {"messages": [{"role": "assistant", "content": "a"}]},
        "messages",
        "not one of the user",
    ),
    "role": ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "Input"),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0]",
        "input_audio",
    ),
    "url": (
        {"messages": ask("", {"type": "video_url", "video_url": {"url": "ftp://a/b"}})},
        "messages[0].content[0]",
        "data:, https:, http: or file:",
    ),
    "kind": (
        {"messages": ask("", {"type": "image_url", "image_url": {"url": data_url(b"x")}})},
        "messages[0].content[0]",
        "of kind video, and not image",
    ),
    "base64": (
        {
            "messages": ask(
                "", {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,a!"}}
            )
        },
        "messages[0].content[0]",
        "is not base64",
    ),
    "broken": ({"messages": ask("", video(b"nothing"))}, "messages[0].content[0]", "is unreadable"),
    "contradiction": (
        {"messages": ask("", video(b"x", num_frames=3, max_frames=4))},
        "video_url.num_frames",
        "contradict each other",
    ),
    "many media": (
        {"messages": ask("", *[image(png(shade)) for shade in range(4)])},
        "messages[0].content[3]",
        "at most 3 images and videos",
    ),
    "media in an answer": (
        {"messages": [{"role": "assistant", "content": [image(png())]}, *ask("What?")]},
        "messages[0].content[0]",
        "only the user sends media",
    ),
    "long text": ({"messages": ask("why " * 4000)}, "messages", "exceed the 256 positions"),
    "long stop": ({"stop": "a" * 257}, "stop[0]", "at most 256 characters"),
    "many messages": (
        {"messages": ask("?") * 101},
        "messages",
        "at most 100 items",
    ),
    "very long text": ({"messages": ask("why " * 5000)}, "messages", "the text cannot fit"),
    "stop": ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
    "listed frames": (
        {
            "messages": ask(
                "",
                {
                    "type": "video_url",
                    "video_url": {"url": "data:video/jpeg;base64," + ",".join(["AA=="] * 33)},
                },
            )
        },
        "messages[0].content[0]",
        "lists 33 frames; 32 are allowed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(chat, name):
    options, param, message = REFUSED[name]
    messages = options.pop("messages", ask("What?"))
    try:
        with pytest.raises((openai.BadRequestError, ValueError)) as refused:
            chat(messages, **options)
        if isinstance(refused.value, openai.BadRequestError):
            assert refused.value.param == param
            assert message in refused.value.body["message"]
    finally:
        options["messages"] = messages


def test_values_that_ask_for_nothing_are_accepted(chat):
    completion = chat(
        ask("What?"),
        n=1,
        logprobs=False,
        presence_penalty=0.0,
        response_format={"type": "text"},
        user="me",
        metadata={"run": "1"},
    )
    assert completion.choices


def test_caps_on_pixels_and_seconds_hold_before_decoding(serve, make_service, clip):
    limits = dataclasses.replace(LIMITS, pixels=100, seconds=0.5)
    url = serve(make_app(make_service(limits)))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for part, message in (
        (image(png()), "pixels exceed 100"),
        (video(clip.read_bytes()), "pixels"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model=MODEL, messages=ask("What?", part))
    limits = dataclasses.replace(LIMITS, seconds=0.5)
    url = serve(make_app(make_service(limits)))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match=r"s exceed 0"):
        client.chat.completions.create(model=MODEL, messages=ask("What?", video(clip.read_bytes())))


def post(url: str, body: bytes, headers: dict[str, str] | None = None):
    """(status, headers, JSON) of a request."""
    headers = {"Content-Type": "application/json"} | (headers or {})
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.headers, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        (b"[]", 400, "not a JSON object but list"),
        (b'"\xff"', 400, "the body is not JSON"),
        (
            rb'{"model": "storm", "messages": [{"role": "user", "content": "\ud800"}]}',
            400,
            "messages[0] is not valid Unicode",
        ),
        (b" " * (LIMITS.body_bytes + 1), 413, "larger than 1,048,576 bytes"),
    ],
)
def test_bodies_that_are_not_requests(served, body, status, message):
    found, _, error = post(served.url, body)
    assert found == status and message in error["error"]["message"]


def test_a_body_that_does_not_arrive_frees_its_place(serve, make_service, monkeypatch):
    monkeypatch.setattr(app_lib, "_BODY_SECONDS", 0.3)
    url = serve(make_app(make_service()))
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_web_page_cannot_send_requests_unasked(served):
    body = json.dumps({"model": MODEL, "messages": ask("What?")}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _, error = post(served.url, body, {"Content-Type": kind})
        assert status == 415 and "use application/json" in error["error"]["message"]
    assert post(served.url, body, {"Content-Type": "application/json; charset=utf-8"})[0] == 200


def test_a_wrong_model_path_and_method(chat, served):
    with pytest.raises(openai.NotFoundError, match="'other' does not exist: use 'storm'"):
        chat(ask("What?"), model="other")
    for method, path, status in (("GET", "/v1/other", 404), ("GET", "/v1/chat/completions", 405)):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(served.url + path, method=method))
        assert error.value.code == status and "error" in json.load(error.value)


def test_models_health_and_metrics(chat, served):
    assert [model.id for model in served.client.models.list()] == [MODEL]
    chat(ask("What?"))
    with urllib.request.urlopen(f"{served.url}/health") as response:
        assert response.status == 200 and response.read() == b""
    with urllib.request.urlopen(f"{served.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['storm_requests_total{status="200"}']) >= 1
    assert float(values['storm_tokens_total{kind="generated"}']) >= 1
    assert float(values["storm_first_token_seconds_count"]) >= 1
    assert float(values["storm_open_requests"]) == float(values["storm_running"]) == 0


def test_an_api_key_is_needed_for_everything_but_health(serve, make_service):
    url = serve(make_app(make_service(), api_key="secret"))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    assert client.models.list()
    for key in ("wrong", "secret2"):
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0).models.list()
    for path in ("/metrics", "/v1/models", "//health", "/health/../metrics"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(url + path)
        assert error.value.code == 401
    with urllib.request.urlopen(f"{url}/health") as response:
        assert response.status == 200


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name} "))
    return float(line.split()[1])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(served, monkeypatch, stream):
    service = served.service
    steps = []
    decode = Programs.decode

    def slow(*args):
        steps.append(service.engine.running)
        time.sleep(0.1)
        return decode(*args)

    monkeypatch.setattr(Programs, "decode", slow)
    body = {
        "model": MODEL,
        "messages": ask("What?"),
        "temperature": 5.0,
        "max_tokens": 24,
        "stream": stream,
    }
    content = json.dumps(body).encode()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        connection.sendall(head.encode() + content)
        wait_for(lambda: len(steps) >= 2)
    wait_for(lambda: service.engine.running == 0, 5)
    assert len(steps) < 20


def test_a_full_queue_is_told_to_try_again(serve, make_service, monkeypatch):
    service = make_service(dataclasses.replace(LIMITS, queued=1), rows=1)
    url = serve(make_app(service))
    go_on = threading.Event()
    decode = Programs.decode

    def wait(*args):
        go_on.wait(30)
        return decode(*args)

    monkeypatch.setattr(Programs, "decode", wait)
    body = json.dumps({"model": MODEL, "messages": ask("What?"), "temperature": 1.0}).encode()
    with ThreadPoolExecutor(2) as pool:
        first = [pool.submit(post, url, body) for _ in range(2)]
        wait_for(lambda: metric(url, "storm_open_requests") == 2)
        status, headers, error = post(url, body)
        go_on.set()
        assert status == 429 and headers["Retry-After"] == "1"
        assert error["error"]["type"] == "RateLimitError"
        assert [done.result()[0] for done in first] == [200, 200]


def test_a_step_that_fails_costs_its_requests_only(chat, monkeypatch):
    decode, failures = Programs.decode, [True]

    def fail_once(*args):
        if failures:
            failures.pop()
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return decode(*args)

    options = {"temperature": 5.0, "max_completion_tokens": 20}
    monkeypatch.setattr(Programs, "decode", fail_once)
    with pytest.raises(openai.InternalServerError, match="log says why"):
        for _ in range(5):  # an answer may be one token
            chat(ask("What?"), **options)
    assert chat(ask("What?"), **options).choices
    failures.append(True)
    with pytest.raises(openai.APIError, match="log says why"):
        for _ in range(5):
            list(chat(ask("What?"), **options, stream=True))


def test_many_requests_at_once_get_what_they_would_alone(chat, served, shapes_folder):
    clips = sorted((shapes_folder / "media/test").glob("*.mp4"))[:3]
    questions = [(clips[n % 3], f"What? {n}", n) for n in range(6)]

    def answer(question) -> str:
        clip, text, seed = question
        options = {"temperature": float(seed % 2), "seed": seed}
        return text_of(chat(ask(text, video(clip.read_bytes())), **options))

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(answer, questions))
    assert together == [answer(question) for question in questions]
    expected = [
        served.predictor.answer(
            clip, text, sampling=Sampling(NEW, temperature=float(seed % 2)), seed=seed
        )
        for clip, text, seed in questions
    ]
    assert together == expected


def test_times_are_numbers_of_json(chat, clip):
    completion = chat(ask("What?", video(clip.read_bytes())))
    assert all(np.isfinite(time) for time in completion.storm["media"][0]["times"])


def test_the_examples_of_the_guide(serve, make_service, shapes_folder, tmp_path, monkeypatch):
    """As they are written, but for the address, and the names of the model and the clip."""
    root = pathlib.Path(__file__).parents[2]
    guide = (root / "docs/serving.md").read_text()
    folder = tmp_path / "data/shapes/media/test"
    folder.mkdir(parents=True)
    clip = sorted((shapes_folder / "media/test").glob("*.mp4"))[0]
    shutil.copy(clip, folder / "000006.mp4")
    url = serve(make_app(make_service(folder=tmp_path / "data")))
    guide = guide.replace("http://127.0.0.1:8000", url).replace('"sft"', f'"{MODEL}"')
    (shell,) = re.findall(r"```sh\n(.*?)```", guide, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    done = subprocess.run(
        ["sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    answer = json.loads(done.stdout)["choices"][0]["message"]["content"]
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == answer != ""
