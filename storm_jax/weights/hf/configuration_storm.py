"""Configuration of a STORM model: SigLIP, a projector that mixes frames over time, and a decoder."""

from __future__ import annotations

import dataclasses

from transformers import AutoConfig, PreTrainedConfig


@dataclasses.dataclass
class TokenPlan:
    """Which frames are averaged, and how many tokens they become. An image is a video of one frame.

    `temporal_pool` frames are averaged, and every `temporal_sample`-th of these groups is kept. A learned vector,
    the newline, may follow an image, and each "row", "group" or "clip" of a video.
    """

    image_side: int
    video_side: int
    temporal_pool: int
    spatial_pool: int
    temporal_sample: int
    image_newline: bool
    video_newline: str

    def groups(self, num_frames: int) -> list[range]:
        """The frames of each group that is kept. The last one may be shorter."""
        starts = range(0, num_frames, self.temporal_pool * self.temporal_sample)
        return [range(i, min(i + self.temporal_pool, num_frames)) for i in starts]

    def tokens(self, num_frames: int) -> list[int]:
        """The number of tokens of each group, with its newlines."""
        if num_frames == 1:
            return [self.image_side**2 + self.image_newline]
        side = -(-self.video_side // self.spatial_pool)
        newlines = {"row": side, "group": 1}.get(self.video_newline, 0)
        counts = [side**2 + newlines] * len(self.groups(num_frames))
        counts[-1] += self.video_newline == "clip"
        return counts


class StormConfig(PreTrainedConfig):
    """The tower is described up to the layer whose output is used; `plan` has the fields of `TokenPlan`. Other fields,
    such as `vision_depth`, the layers of the tower's checkpoint, are for STORM in JAX."""

    model_type = "storm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012
    has_no_defaults_at_init = True

    def __init__(
        self, *, vision_config, vision_final_norm, text_config, stem, mixer, mamba, plan, **kwargs
    ):
        self.vision_config, self.text_config = (
            AutoConfig.for_model(**config) if isinstance(config, dict) else config
            for config in (vision_config, text_config)
        )
        self.vision_final_norm, self.stem, self.plan = vision_final_norm, stem, plan
        self.mixer, self.mamba = mixer, mamba
        super().__init__(**kwargs)
