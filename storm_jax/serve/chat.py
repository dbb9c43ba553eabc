"""The body of `POST /v1/chat/completions`: checked strictly, so that nothing is silently ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from storm_jax.serve.errors import ApiError
from storm_jax.serve.fields import Strict, check_text

# Fields that this server does not support, with the values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "store": (False,),
}


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(Strict):
    """`fps` frames per second are sampled, at most `num_frames`. `max_frames` is another name for the latter."""

    url: str
    fps: float | None = Field(default=None, gt=0, le=1000)
    num_frames: int | None = Field(default=None, ge=1)
    max_frames: int | None = Field(default=None, ge=1)


class VideoPart(Strict):
    type: Literal["video_url"]
    video_url: VideoUrl
    uuid: str | None = None  # a label; tables are kept by content


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part]
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(Strict):
    include_usage: bool = False


class VideoSettings(Strict):
    fps: float | None = Field(default=None, gt=0, le=1000)
    num_frames: int | None = Field(default=None, ge=1)


class MediaSettings(Strict):
    video: VideoSettings = VideoSettings()


class ProcessorSettings(VideoSettings):
    do_sample_frames: Literal[True] = True


class Compression(Strict):
    """Our own: token compression of the request, by default that of training. Few values, since each compiles programs."""

    temporal_pool: Literal[1, 2, 4, 8, 16] | None = None
    spatial_pool: Literal[1, 2, 4] | None = None
    temporal_sample: Literal[1, 2, 4, 8] | None = None


class ChatRequest(Strict):
    model: str
    messages: list[Message] = Field(min_length=1, max_length=100)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=10)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        default=[], max_length=4
    )
    media_io_kwargs: MediaSettings = MediaSettings()
    mm_processor_kwargs: ProcessorSettings = ProcessorSettings()
    storm: Compression = Compression()
    user: str | None = None  # labels
    metadata: dict[str, str] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    def frame_settings(self, part: VideoUrl) -> tuple[float | None, int | None]:
        """The rate and the number of frames that were asked for; None where they were not.

        Raises:
          ApiError: two fields contradict each other.
        """
        everywhere = (self.media_io_kwargs.video, self.mm_processor_kwargs)
        rates = {"video_url.fps": part.fps}
        counts = {"video_url.num_frames": part.num_frames, "video_url.max_frames": part.max_frames}
        for name, settings in zip(
            ("media_io_kwargs.video", "mm_processor_kwargs"), everywhere, strict=True
        ):
            rates[f"{name}.fps"], counts[f"{name}.num_frames"] = settings.fps, settings.num_frames
        return _only(rates), _only(counts)


def _only(values: Mapping[str, Any]) -> Any:
    given = {name: value for name, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        listed = " and ".join(f"{name}={value}" for name, value in given.items())
        raise ApiError(400, f"{listed} contradict each other", param=next(iter(given)))
    return next(iter(given.values()), None)


def parse(body: Any) -> ChatRequest:
    """Checks the body of a request.

    Raises:
      ApiError: it names the field.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is not a JSON object but {type(body).__name__}")
    fields = {name: value for name, value in body.items() if value is not None}
    for name, allowed in _NEUTRAL.items():
        value = fields.pop(name, allowed[0])
        if not any(value == each and type(value) is type(each) for each in allowed):
            raise ApiError(400, f"{name}={value!r} is not supported: leave it out", param=name)
    try:
        chat = ChatRequest.model_validate(fields)
        check_text(chat.model, "model")
        for number, turn in enumerate(chat.messages):
            for part in turn.content:
                if isinstance(part, TextPart):
                    check_text(part.text, f"messages[{number}]")
        return chat
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = _name(first["loc"])
        message = (
            "is not a field that this server knows"
            if first["type"] == "extra_forbidden"
            else first["msg"]
        )
        raise ApiError(400, f"{name}: {message}", param=name) from None


def _name(location: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].video_url.fps`, without the names of alternatives."""
    kinds = ("text", "image_url", "video_url")
    name, previous = "", None
    for part in location:
        is_kind = isinstance(previous, int) and part in kinds
        previous = part
        if isinstance(part, int):
            name += f"[{part}]"
        elif not is_kind:
            name += f".{part}" if name else part
    return name
