"""A video over a WebSocket: the same answers as a stream, bounded queues, and sessions that do not mix."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import time

import numpy as np
import openai
import pytest
from PIL import Image
from serving.conftest import LIMITS, ask, data_url, wait_for
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from storm_jax.inference.generate import Sampling
from storm_jax.serve import live
from storm_jax.serve.app import make_app

CONFIG = {"type": "session.config", "fps": 0, "budget_tokens": 64}


class Session:
    """A client."""

    def __init__(self, url: str, config: dict | None = None, **options):
        address = url.replace("http://", "ws://") + "/v1/video/chat/stream"
        self._socket = connect(address, **options)
        if config is not None:
            self.send(**config)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, **message) -> None:
        self._socket.send(json.dumps(message))

    def send_text(self, text: str | bytes) -> None:
        self._socket.send(text)

    def frame(self, number: int, **extra) -> None:
        buffer = io.BytesIO()
        picture(number).save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        self.send(type="video.frame", data=data, time=float(number), **extra)

    def receive(self) -> dict:
        return json.loads(self._socket.recv(timeout=30))

    def until(self, kind: str) -> list[dict]:
        """All messages up to one of a kind."""
        messages = [self.receive()]
        while messages[-1]["type"] != kind:
            messages.append(self.receive())
        return messages


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def error_of(message: dict) -> str:
    assert message["type"] == "error"
    return message["error"]["message"]


def test_answers_are_those_of_a_stream(served):
    stream = served.predictor.stream(fps=0, budget_tokens=64)
    with Session(served.url, CONFIG) as session:
        assert session.receive() == {"type": "session.created", "mode": stream.stats.mode}
        for first in (0, 5):
            for number in range(first, first + 5):
                session.frame(number)
                stream.push(np.asarray(picture(number)), float(number))
            session.send(type="video.query", text="What?", max_tokens=8)
            start, *deltas, done = session.until("response.text.done")
            assert start["type"] == "response.start"
            expected = "".join(stream.ask("What?", sampling=Sampling(8)))
            assert "".join(each["delta"] for each in deltas) == done["text"] == expected
            assert done["stats"]["used"] == first + 5 and done["stats"]["dropped"] == 0
        session.send(type="video.done")
        assert session.receive()["type"] == "session.done"


def test_sessions_do_not_mix(served):
    with Session(served.url, CONFIG) as one, Session(served.url, CONFIG) as other:
        texts = []
        for first in (0, 50):
            for number in range(4):
                one.frame(first + number)
                other.frame(50 - first + number) if not first else None
            if not first:
                for session in (one, other):
                    session.send(type="video.query", text="What?", max_tokens=8)
                    texts.append(session.until("response.text.done")[-1])
    assert texts[0]["stats"]["used"] == texts[1]["stats"]["used"] == 4
    stream = served.predictor.stream(fps=0, budget_tokens=64)
    for number in range(4):
        stream.push(np.asarray(picture(50 + number)), float(50 + number))
    assert texts[1]["text"] == "".join(stream.ask("What?", sampling=Sampling(8)))


def test_when_the_model_is_too_slow_the_oldest_frames_are_dropped(served, monkeypatch):
    push = live._push
    monkeypatch.setattr(live, "_push", lambda *args: (time.sleep(0.2), push(*args)))
    with Session(served.url, CONFIG) as session:
        for number in range(30):
            session.frame(number)
        session.send(type="video.query", text="What?", max_tokens=2)
        stats = session.until("response.text.done")[-1]["stats"]
    assert stats["received"] == 30 and stats["dropped"] > 10
    assert stats["used"] + stats["dropped"] == 30
    assert stats["seconds"] <= 29


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"type": "video.query", "text": "What?"}, "nothing has been pushed yet"),
        ({"type": "video.query"}, "text: Field required"),
        ({"type": "video.query", "text": "a", "n": 2}, "n: Extra inputs"),
        ({"type": "video.frame", "data": "a!"}, "is not base64"),
        ({"type": "video.frame", "data": "AAAA"}, "unsupported image format"),
        ({"type": "other"}, "type='other' is not known"),
        ([1], "type=None is not known"),
    ],
)
def test_a_message_that_is_wrong_does_not_end_the_session(served, message, error):
    with Session(served.url, CONFIG) as session:
        session.receive()
        session.send_text(json.dumps(message))
        assert error in error_of(session.until("error")[-1])
        session.frame(0)
        session.send(type="video.query", text="What?", max_tokens=2)
        assert session.until("response.text.done")


@pytest.mark.parametrize("text", ["{", b"bytes", ""])
def test_what_is_not_json_does_not_end_the_session(served, text):
    with Session(served.url, CONFIG) as session:
        session.receive()
        session.send_text(text)
        assert "not JSON" in error_of(session.receive())
        session.frame(0)
        session.send(type="video.query", text="What?", max_tokens=2)
        assert session.until("response.text.done")


def test_a_session_whose_frames_fail_ends_and_frees_its_place(served, monkeypatch):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    with Session(served.url, CONFIG) as session:
        session.receive()
        monkeypatch.setattr(live, "_push", fail)
        session.frame(0)
        session.send(type="video.query", text="What?")
        assert "log says why" in error_of(session.receive())
    wait_for(lambda: served.service.sessions == 0, 10)


def test_clients_that_leave_with_frames_waiting_free_their_places(served):
    for _ in range(LIMITS.sessions):
        session = Session(served.url, CONFIG)
        session.receive()
        for _ in range(4):
            session.send(type="video.frame", data="AAAA")
        session.send(type="video.query", text="What?")
        session._socket.close()
    wait_for(lambda: served.service.sessions == 0, 10)


def test_times_that_go_back_are_an_error_of_that_frame(served):
    with Session(served.url, CONFIG) as session:
        session.receive()
        session.frame(5)
        session.frame(3)
        assert "times must ascend" in error_of(session.receive())


@pytest.mark.parametrize(
    ("first", "error"),
    [
        ("{", "not JSON"),
        ("[]", "valid dictionary"),
        ('{"type": "video.frame"}', "session.config"),
        ('{"type": "session.config", "budget_tokens": 0}', "budget_tokens"),
        ('{"type": "session.config", "policy": "merge"}', "direction='forward'"),
    ],
)
def test_a_session_needs_a_configuration(served, first, error):
    with Session(served.url) as session:
        session.send_text(first)
        assert error in error_of(session.receive())
        with pytest.raises(ConnectionClosed):
            session.receive()
    assert served.service.sessions == 0


def test_a_session_that_is_silent_ends(served, monkeypatch):
    monkeypatch.setattr(live, "IDLE", 0.5)
    with Session(served.url, CONFIG) as session:
        session.receive()
        assert "no message for 0.5 s" in error_of(session.receive())


def test_pages_of_other_sites_cannot_connect(served):
    with pytest.raises(InvalidStatus):
        Session(served.url, CONFIG, origin="http://evil.example")
    with Session(served.url, CONFIG, origin=served.url) as session:
        assert session.receive()["type"] == "session.created"


def test_sessions_are_counted_and_need_the_key(serve, make_service):
    service = make_service(dataclasses.replace(LIMITS, sessions=1))
    url = serve(make_app(service, api_key="secret"))
    with Session(url, CONFIG) as session:
        assert "API key" in error_of(session.receive())
    with Session(url, CONFIG | {"api_key": "secret"}) as session:
        session.receive()
        with Session(url, CONFIG | {"api_key": "secret"}) as second:
            assert "1 sessions are open" in error_of(second.receive())
    wait_for(lambda: service.sessions == 0, 10)


def test_chat_goes_on_while_a_session_is_open(served):
    with Session(served.url, CONFIG) as session:
        session.receive()
        session.frame(0)
        part = {"type": "image_url", "image_url": {"url": data_url(b"x", "image/png")}}
        with pytest.raises(openai.BadRequestError):
            served.client.chat.completions.create(model="storm", messages=ask("What?", part))
        session.send(type="video.query", text="What?", max_tokens=4)
        assert session.until("response.text.done")
