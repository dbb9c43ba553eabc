"""Prompts, images and videos for a STORM model: the frames, pixels and token ids that it was trained with."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import make_batched_videos

from .configuration_storm import TokenPlan

_APART = "\0"  # around text that is tokenised on its own
_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


class StormImageProcessor(BaseImageProcessor):
    """PIL images, arrays, paths or URLs -> `pixel_values` [B, 3, S, S] in [-1, 1]."""

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def preprocess(self: Any, images: Any, **_: Any) -> BatchFeature:
        frames = [_resize(image, self.size["height"]) for image in _flatten(images)]
        return BatchFeature({"pixel_values": _normalise(frames)})


class StormVideoProcessor(BaseVideoProcessor):
    """Videos, as paths or frames -> `pixel_values_videos` [B, F, 3, S, S] in [-1, 1], or a list if lengths differ.
    Frames are evenly spaced in time, `num_frames` or, at the rate `fps`, at most as many. Given frames have the times
    that `fps` (default 1) and `frames_indices` in `video_metadata` say."""

    model_input_names = ["pixel_values_videos"]  # noqa: RUF012
    do_sample_frames = True

    def preprocess(
        self: Any, videos, video_metadata=None, do_sample_frames=None, num_frames=None, fps=None, **_
    ) -> BatchFeature:  # fmt: skip
        """Returns `video_times` too: the seconds of each video's frames."""
        size, limit, rate = self.size["height"], num_frames or self.num_frames, fps or self.fps
        sample = self.do_sample_frames if do_sample_frames is None else do_sample_frames
        videos = make_batched_videos(videos)
        clips, times = [], []
        metadata = _flatten(video_metadata or [{}] * len(videos))
        for video, about in zip(videos, metadata, strict=True):
            if isinstance(video, str):
                frames, seconds = _read(video, size, limit, rate)
            else:
                indices = about.get("frames_indices")
                order = np.arange(len(video)) if indices is None else np.asarray(indices)
                seconds = (order - order[0]) / (about.get("fps") or 1.0)
                picks = _choose(seconds, limit, rate) if sample else np.arange(len(video))
                frames, seconds = [_resize(video[i], size) for i in picks], seconds[picks]
            clips.append(_normalise(frames))
            times.append(seconds)
        pixels = torch.stack(clips) if len(set(map(len, clips))) == 1 else clips
        return BatchFeature({"pixel_values_videos": pixels, "video_times": times})


class StormProcessor(ProcessorMixin):
    """Replaces <image> and <video> in a rendered prompt by placeholders, with the layout's text around them.
    `settings` are the fields of `TokenPlan` (`plan`), the texts (`layout`), and where times go (`time_text`)."""

    def __init__(self, image_processor, tokenizer, video_processor, settings, chat_template=None):
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        self.settings, self.image_token, self.video_token = settings, "<image>", "<video>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)  # transformers cannot look up video processors without torchvision

    def __call__(
        self, images=None, text="", videos=None, return_text_replacement_offsets=False, **kwargs
    ) -> BatchFeature:
        """Returns tensors; rows are padded on the left. No special tokens are added to those of the prompt."""
        data, images_text, videos_text = {}, [], []
        if images is not None:
            data.update(self.image_processor(images))
            images_text = [self._expand()] * len(data["pixel_values"])
        if videos is not None:
            data.update(self.video_processor(videos, **kwargs))
            videos_text = [self._expand(times) for times in data.pop("video_times")]
        space = r"\s+" if self.settings["layout"]["trim"] else ""
        texts = [re.sub(f"(<image>|<video>){space}", r"\1", each) for each in _flatten(text)]
        for token, found in ((self.image_token, images_text), (self.video_token, videos_text)):
            if (count := sum(each.count(token) for each in texts)) != len(found):
                raise ValueError(f"the text has {count} {token}, but {len(found)} are given")
        offsets: Any
        texts, offsets = self.get_text_with_replacements(texts, images_text, videos_text)
        encode = self.tokenizer.backend_tokenizer.encode
        rows = [
            [i for part in each.split(_APART) for i in encode(part, add_special_tokens=False).ids]
            for each in texts
        ]
        size, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        padded = torch.tensor([[-1] * (size - len(row)) + row for row in rows])
        data["input_ids"] = padded.masked_fill(padded < 0, pad)
        data["attention_mask"] = (padded >= 0).long()
        if return_text_replacement_offsets:
            for entry in (entry for row in offsets for entry in row):
                entry["replacement"] = entry["replacement"].replace(_APART, "")
            data["text_replacement_offsets"] = offsets
        return BatchFeature(data)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_: Any) -> str:
        return self._expand().replace(_APART, "")

    def replace_video_token(self, video_inputs: Any, video_idx: int, **_: Any) -> str:
        return self._expand(video_inputs["video_times"][video_idx]).replace(_APART, "")

    def _get_num_multimodal_tokens(self, image_sizes=(), video_sizes=(), **_) -> MultiModalData:
        """Tokens of images (height, width), and of videos (frames, height, width) that are not sampled again."""
        tokens = TokenPlan(**self.settings["plan"]).tokens
        return MultiModalData(
            num_image_tokens=[sum(tokens(1)) for _ in image_sizes],
            num_image_patches=[1 for _ in image_sizes],
            num_video_tokens=[sum(tokens(int(size[0]))) for size in video_sizes],
        )

    def _expand(self, times: np.ndarray | None = None) -> str:
        """What replaces an image, or a video with frames at `times` in seconds."""
        layout, style = self.settings["layout"], self.settings["time_text"]
        plan = TokenPlan(**self.settings["plan"])

        def text(name: str, apart: bool = not layout["joined"], **values: Any) -> str:
            found = layout[name].format(**values) if values else layout[name]
            return f"{_APART}{found}{_APART}" if apart else found

        before, after = text("before_group"), text("after_group")
        if times is None:
            return before + self.image_token * sum(plan.tokens(1)) + after
        count, last, all_times = len(times), times[-1], ",".join(f"{time:.2f}s" for time in times)
        about: Any = {"frames": _in_words(count), "count": count, "times": all_times}
        about["seconds"] = f"{last + 0.04:.2f}"  # the last frame is shown as long as one at 25 Hz
        about["duration"] = datetime.timedelta(seconds=int(last + 0.04))
        found = text("before_video", **about)
        if style == "sentence":
            at = ", ".join(f"{time:.1f}" for time in times)
            line = f"The video lasts {last:.1f} s. Its {count} frames are at {at} s.\n"
            found += f"{_APART}{line}{_APART}"
        for group, tokens in zip(plan.groups(count), plan.tokens(count), strict=True):
            time = times[group.start]
            found += text("group_time", time=f"{int(time) // 60:02}:{int(time) % 60:02}")
            found += f"{_APART}{time:.1f} s: {_APART}" if style == "per_group" else ""
            found += before + self.video_token * tokens + after
        return found + text("after_video", **about)


def _choose(seconds: np.ndarray, limit: int, fps: float | None) -> np.ndarray:
    """The frames nearest to evenly spaced times, the earlier one in a tie."""
    count = max(1, min(limit, round(seconds[-1] * fps) + 1)) if fps else limit
    times = np.linspace(0, seconds[-1], count)
    after = np.searchsorted(seconds, times).clip(0, len(seconds) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(times - seconds[before] <= seconds[after] - times, before, after)


def _read(path: str, size: int, limit: int, fps: float | None) -> tuple[list, np.ndarray]:
    """Decodes the chosen frames of a video file; returns their times in seconds too."""
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV (pip install av); or pass frames") from error
    with av.open(path) as file:
        stream: Any = file.streams.best("video")
        packets = [packet for packet in file.demux(stream) if packet.size and not packet.is_discard]
        stamps = np.unique([packet.pts for packet in packets if packet.pts is not None])
        seconds = (stamps - stamps[:1]) * float(stream.time_base)
    if not len(stamps):
        raise ValueError(f"{path} has no times of frames: decode it, and pass the frames")
    picks = _choose(seconds, limit, fps)
    wanted, found = stamps[picks].tolist(), {}
    with av.open(path) as file:
        frame: Any
        for frame in file.decode(file.streams.best("video")):
            if frame.pts in wanted:
                image = frame.reformat(size, size, "rgb24", interpolation="BICUBIC").to_ndarray()
                found[frame.pts] = np.rot90(image, frame.rotation // 90)
            if len(found) == len(set(wanted)):
                return [found[stamp] for stamp in wanted], seconds[picks]
    raise ValueError(f"{path}: only {len(found)} of {len(set(wanted))} frames can be decoded")


def _resize(image: Any, size: int) -> np.ndarray:
    """An image as uint8 [size, size, 3], upright, on white where it is transparent."""
    if isinstance(image, str):
        image = load_image(image) if image.startswith(("http", "data:")) else Image.open(image)
    elif not isinstance(image, Image.Image):
        image = to_pil_image(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def _normalise(frames: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 [S, S, 3] of each frame -> [F, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _flatten(nested: Any) -> list[Any]:
    if not isinstance(nested, (list, tuple)):
        return [nested]
    return [item for each in nested for item in _flatten(each)]


def _in_words(number: int) -> str:
    for unit, name, joint in ((1000, "thousand", ", "), (100, "hundred", " and ")):
        if number >= unit:
            rest = number % unit
            joint = " and " if rest < 100 else joint
            return f"{_in_words(number // unit)} {name}" + (joint + _in_words(rest) if rest else "")
    ones = f"-{_ONES[number % 10]}" if number % 10 else ""
    return _ONES[number] if number < 20 else _TENS[number // 10 - 2] + ones
