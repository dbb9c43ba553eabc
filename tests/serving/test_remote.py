"""A decoder elsewhere: a fake vLLM checks what it gets, and runs our decoder on it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import ml_dtypes
import numpy as np
import openai
import pytest
import torch
from serving.conftest import MODEL, Served, ask, video

from storm_jax.inference.engine import Request
from storm_jax.inference.generate import Sampling
from storm_jax.serve.app import make_app
from storm_jax.serve.remote import RemoteDecoder, torch_file


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 96)])
def test_torch_reads_the_file(dtype, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    tensor = torch.load(io.BytesIO(torch_file(x)), weights_only=True)
    assert tensor.shape == shape
    np.testing.assert_array_equal(tensor.float().numpy(), x.astype(np.float32))


class FakeServer(BaseHTTPRequestHandler):
    """Streams the `answer`, a list of chunks of token ids; `seen` are the bodies of requests."""

    seen: list[dict]
    answer: list[list[int]]
    status = 200
    pause = 0.0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, **body})
        self.send_response(self.status)
        self.end_headers()
        if self.status != 200:
            return
        for number, ids in enumerate(self.answer):
            is_last = number == len(self.answer) - 1
            choice = {
                "index": 0,
                "text": "?",
                "token_ids": ids,
                "finish_reason": "length" if is_last else None,
            }
            self.send(json.dumps({"choices": [choice]}))
            time.sleep(self.pause)
        self.send("[DONE]")

    def send(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def fake():
    """(address, handler) of a server."""
    handler = type("F", (FakeServer,), {"seen": [], "answer": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def remote(fake, serve, make_service, predictor) -> Served:
    service = make_service(decoder=(fake[0], "decoder"))
    return Served(serve(make_app(service)), service, predictor)


def create(served: Served, messages, **options):
    return served.client.chat.completions.create(model=MODEL, messages=messages, **options)


def test_it_gets_the_embeddings_of_the_whole_prompt(fake, remote, clip):
    _, handler = fake
    handler.answer = [[5, 6], [7]]
    options = {"temperature": 0.5, "top_p": 0.9, "max_completion_tokens": 9, "seed": 4}
    completion = create(remote, ask("What?", video(clip.read_bytes())), **options)
    (seen,) = handler.seen
    assert seen["path"] == "/v1/completions" and seen["model"] == "decoder"
    assert (seen["temperature"], seen["top_p"], seen["max_tokens"]) == (0.5, 0.9, 9)
    assert seen["stop_token_ids"] == list(remote.predictor.stop_ids) and seen["return_token_ids"]
    content = base64.b64decode(seen["prompt_embeds"])
    x = torch.load(io.BytesIO(content), weights_only=True)
    width = remote.predictor.config.model.decoder.width
    assert x.shape == (completion.usage.prompt_tokens, width) and x.dtype == torch.float32
    assert completion.usage.completion_tokens == 3
    assert completion.choices[0].finish_reason == "length"


def test_with_the_same_tokens_the_text_is_that_of_our_engine(fake, remote, clip):
    """And the embeddings are those that our decoder continues in the same way."""
    _, handler = fake
    captured = []
    engine = remote.service.engine
    original = engine.answer

    async def watch(request):
        async for ids in original(request):
            captured.append(list(ids))
            yield ids

    messages = ask("What?", video(clip.read_bytes()))
    sampling = Sampling(16)
    expected = remote.predictor.answer(clip, "What?", sampling=sampling)
    remote.service._writer, writer = engine, remote.service._writer
    engine.answer = watch
    ours = create(remote, messages, max_completion_tokens=16)
    remote.service._writer = writer
    handler.answer = captured
    theirs = create(remote, messages, max_completion_tokens=16)
    assert theirs.choices[0].message.content == ours.choices[0].message.content == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 500}, "answered with 500"),
        ({"answer": [None]}, "returns no token ids"),
        ({"send": lambda self, _: self.connection.close()}, "ended an answer early"),
    ],
)
def test_its_failures_are_said(fake, remote, change, message):
    _, handler = fake
    handler.answer = [[1]]
    for name, value in change.items():
        setattr(handler, name, value)
    with pytest.raises(openai.InternalServerError, match=message):
        create(remote, ask("What?"))


def test_a_server_that_is_not_there(serve, make_service):
    service = make_service(decoder=("http://127.0.0.1:1/v1", "decoder"))
    served = Served(serve(make_app(service)), service, service._predictor)
    with pytest.raises(openai.InternalServerError, match="server failed: ConnectionRefusedError"):
        create(served, ask("What?"))
    with pytest.raises(ValueError, match="--decoder=vllm: use the address of an API"):
        make_service(decoder=("vllm", "decoder"))


def test_a_client_that_leaves_closes_the_connection(fake, remote):
    url, handler = fake
    handler.answer, handler.pause = [[1]] * 50, 0.05
    broken = threading.Event()
    send = handler.send

    def watch(self, data: str) -> None:
        try:
            send(self, data)
        except OSError:
            broken.set()
            raise

    handler.send = watch

    async def leave_early() -> None:
        async def embed(_):
            return np.zeros((3, 4), np.float32)

        decoder = RemoteDecoder(url, "decoder", embed, (2,))
        request = Request(tokens=np.ones(3), visual_index=np.ones(3), table=None)
        answer = decoder.answer(request)
        await anext(answer)
        await answer.aclose()
        assert request.finish == "cancelled"

    asyncio.run(leave_early())
    assert broken.wait(5)
