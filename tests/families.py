"""Small random models of every family that is imported whole, with torch references.

    VILA           a reference written from its public description
    LLaVA          transformers' LlavaOnevision; the original layout by hand
    SmolVLM        transformers' SmolVLM, with the text of its processor

`logits` and `greedy` are the family's own forward pass. `inputs` builds the embeddings by hand, which also allows
temporal pooling.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from PIL import Image
from reference_models import (
    BASE,
    PLAIN_ROPE,
    make_decoder,
    make_tokenizer,
    make_tower,
    randomised,
    save,
)
from safetensors.torch import save_file
from torch import nn

from storm_jax.media.media import Media
from storm_jax.text.sample import PLACEHOLDER, Sample, Turn

SIZE, NEW = 56, 32
QUESTIONS = {
    "an image": ("<image>\nWhat colour?", ["a.png"]),
    "two images": ("<image>\n<image>\nWhich?", ["a.png", "b.png"]),
    "a video": ("<video>\nWhy?", ["clip"]),
    "a ragged video": ("<video>\nWhy?", ["short"]),
}
_TOWER = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": SIZE, "patch_size": 14,
}  # fmt: skip


def write_media(folder: pathlib.Path) -> pathlib.Path:
    """Images and folders of frames, of the tower's size, so that they are read as they are."""
    rng = np.random.default_rng(5)
    for name in ("a.png", "b.png", *(f"clip/{i}.png" for i in range(8)), *(f"short/{i}.png" for i in range(5))):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(folder / name)
    return folder


def sample_of(question: str, media: pathlib.Path) -> tuple[Sample, list[np.ndarray]]:
    """A question with its answer, and the frames of its media."""
    text, names = QUESTIONS[question]
    kind = "video" if "<video>" in text else "image"
    turns = (Turn("user", text), Turn("assistant", "red\nand green"))
    clips = [_frames_of(media / name) for name in names]
    files = tuple(
        dataclasses.replace(Media.file(kind, media / name), nframes=len(clip))
        for name, clip in zip(names, clips, strict=True)
    )
    return Sample(id=question, turns=turns, media=files, extra={}), clips


def _frames_of(path: pathlib.Path) -> np.ndarray:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return np.stack([np.asarray(Image.open(file)) for file in files])


def pixels_of(frames: np.ndarray) -> torch.Tensor:
    """[T, 3, H, W] from uint8 [T, H, W, 3]."""
    return torch.from_numpy((frames / 255.0 - 0.5) / 0.5).float().permute(0, 3, 1, 2)


def groups_of(features: torch.Tensor, k: int) -> torch.Tensor:
    """The means [G, N, D] of every k frames of [T, N, D]."""
    return torch.stack([part.mean(0) for part in features.split(k)])


class Reference:
    """A torch model in a folder.

    Attributes:
      folder: what is imported.
      tokenizer: that of the folder.
      pool: frames per group that the model itself averages.
    """

    folder: pathlib.Path
    tokenizer: transformers.PreTrainedTokenizerBase
    decoder: nn.Module
    pool = 1

    def rendered(self, sample: Sample, *, opened: bool) -> str:
        """The conversation as the model's users render it; `opened` leaves out the answer."""
        turns = sample.turns[:1] if opened else sample.turns
        messages = [{"role": turn.role, "content": self.content(turn.text)} for turn in turns]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opened
        )

    def content(self, text: str) -> str | list[dict[str, str]]:
        return text

    def inputs(self, text: str, clips: Sequence[np.ndarray], k: int) -> torch.Tensor:
        """Embeddings [1, S, D] of a rendered text, with k frames per group."""
        raise NotImplementedError

    def logits(self, text: str, clips: Sequence[np.ndarray]) -> np.ndarray:
        """[S, V]"""
        return self.logits_from(self.inputs(text, clips, self.pool))

    def logits_from(self, inputs: torch.Tensor) -> np.ndarray:
        """[S, V] from embeddings [1, S, D]."""
        with torch.no_grad():
            return self.decoder(inputs_embeds=inputs).logits[0].numpy()

    def greedy(self, text: str, clips: Sequence[np.ndarray]) -> list[int]:
        inputs = self.inputs(text, clips, self.pool)
        return self._generate(
            self.decoder, inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2])
        )

    def _generate(self, model: nn.Module, **inputs: torch.Tensor) -> list[int]:
        stops = [
            i for t in self.stops if (i := self.tokenizer.convert_tokens_to_ids(t)) is not None
        ]
        with torch.no_grad():
            found = model.generate(
                **inputs, do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=stops
            )[0]
        return found[inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :].tolist()

    stops = ("<|im_end|>", "<|endoftext|>")


# --- VILA


KINDS = {"mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3, "mlp_downsample": 2, "linear": 1}


class Downsample(nn.Module):
    """Concatenates the features of r x r patches; zeros fill odd grids at the bottom and right."""

    def __init__(self, r: int):
        super().__init__()
        self.r = r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side, r = round(x.shape[1] ** 0.5), self.r
        rest = -side % r
        x = nn.functional.pad(x.reshape(len(x), side, side, -1), (0, 0, 0, rest, 0, rest))
        cells = x.unfold(1, r, r).unfold(2, r, r)  # [F, S, S, C, r, r]
        return cells.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)


def vila_projector(kind: str, inputs: int, width: int) -> nn.Module:
    r = KINDS[kind]
    merged = inputs * r * r
    layers: list[nn.Module] = [Downsample(r), nn.LayerNorm(merged)]
    if kind == "linear":
        return nn.Linear(inputs, width)
    if r == 3:
        layers += [nn.Linear(merged, inputs * 3), nn.GELU(), nn.LayerNorm(inputs * 3)]
        merged = inputs * 3
    return nn.Sequential(*layers, nn.Linear(merged, width), nn.GELU(), nn.Linear(width, width))


class Vila(Reference):
    """A newline of the tokenizer follows every image and pooled frame."""

    def __init__(self, folder: pathlib.Path, kind: str, pool: tuple[int, int] = (2, 1)):
        self.folder, (self.pool, self.spatial_pool) = folder, pool
        self.tower, self.decoder = make_tower(), make_decoder("qwen2")
        self.projector = randomised(vila_projector(kind, 24, 56), seed=1)
        save(self.tower, folder / "vision_tower")
        save(self.decoder, folder / "llm", "qwen2")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "llm")
        with_media = transformers.AutoTokenizer.from_pretrained(folder / "llm")
        with_media.add_tokens(
            [f"<vila/{i}>" for i in range(24)], special_tokens=True
        )  # beyond the embedding
        with_media.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<vila/video>"]})
        with_media.save_pretrained(folder / "llm")
        (folder / "mm_projector").mkdir()
        tensors = {f"layers.{name}": value for name, value in self.projector.state_dict().items()}
        save_file(tensors, folder / "mm_projector/model.safetensors")
        (folder / "mm_projector/config.json").write_text(
            json.dumps({"model_type": "v2l_projector", "mm_projector_type": kind})
        )
        encoder = {
            "_target_": "llava.model.encoders.TSPVideoEncoder",
            "pool_sizes": [[pool[0], pool[1], pool[1]]],
        }
        fields = {
            "model_type": "llava_llama", "llm_cfg": {}, "vision_tower_cfg": {}, "mm_projector_cfg": {},
            "mm_vision_select_layer": None, "num_video_frames": 8, "fps": 0.0,
            "mm_vision_select_feature": "cls_patch", "image_aspect_ratio": "resize", "mm_use_im_patch_token": True,
            "image_encoder": '{"_target_": "llava.model.encoders.BasicImageEncoder"}',
            "video_encoder": json.dumps(encoder),
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(fields))

    def inputs(self, text: str, clips: Sequence[np.ndarray], k: int) -> torch.Tensor:
        pieces = PLACEHOLDER.split(re.sub(r"(<image>|<video>)\s+", r"\1", text))
        parts = [self._words(pieces[0])]
        for piece, frames in zip(pieces[1:], clips, strict=True):
            for group in self._groups(frames, k):
                parts += [group, self._words("\n")]
            parts.append(self._words(piece))
        return torch.cat(parts)[None]

    def _words(self, text: str) -> torch.Tensor:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return self.decoder.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))

    def _groups(self, frames: np.ndarray, k: int) -> torch.Tensor:
        """Embeddings [G, N, D] of the pooled groups of uint8 [T, H, W, 3]."""
        hidden = self.tower(pixels_of(frames), output_hidden_states=True).hidden_states[-2]
        x = self.projector(hidden)
        if len(frames) == 1:
            return x
        groups = groups_of(x, k)
        side = round(groups.shape[1] ** 0.5)
        cells = groups.reshape(len(groups), side, side, -1).permute(0, 3, 1, 2)
        space = self.spatial_pool
        pooled = nn.functional.avg_pool2d(cells, space, ceil_mode=True, count_include_pad=False)
        return pooled.flatten(2).transpose(1, 2)


# --- models whose visual tokens replace a token of the text


class WithImageToken(Reference):
    def expanded(self, text: str, clips: Sequence[np.ndarray], k: int) -> str:
        """`text` with a token for every visual token."""
        raise NotImplementedError

    def features(self, frames: np.ndarray, k: int) -> torch.Tensor:
        """[N, D], what replaces the tokens of a clip."""
        raise NotImplementedError

    def ids(self, text: str, clips: Sequence[np.ndarray], k: int = 1) -> torch.Tensor:
        """[1, S]"""
        found = self.tokenizer.encode(self.expanded(text, clips, k), add_special_tokens=False)
        return torch.tensor([found])

    def inputs(self, text: str, clips: Sequence[np.ndarray], k: int) -> torch.Tensor:
        ids = self.ids(text, clips, k)
        x = self.decoder.get_input_embeddings()(ids).detach()
        visual = torch.tensor(self.tokenizer.convert_tokens_to_ids(["<image>", "<video>"]))
        x[torch.isin(ids, visual)] = torch.cat([self.features(clip, k) for clip in clips])
        return x


def _tokenizer_with(tokens: list[str]) -> transformers.PreTrainedTokenizerBase:
    tokenizer = make_tokenizer("qwen2")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", *tokens]})
    return tokenizer


class _Llava(WithImageToken):
    """Both layouts answer in ChatML with Qwen2's system text."""

    def rendered(self, sample: Sample, *, opened: bool) -> str:
        system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        text = super().rendered(sample, opened=opened)
        return system + text[text.index("<|im_start|>user") :]


class LlavaOneVision(_Llava):
    """transformers' class. An image is one of several, which are not split into tiles."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.tokenizer = _tokenizer_with(["<image>", "<video>"])
        image, video = self.tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
        config = transformers.LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_TOWER},
            text_config={"model_type": "qwen2", **BASE, "rope_parameters": PLAIN_ROPE},
            image_token_index=image, video_token_index=video, image_grid_pinpoints=[[SIZE, SIZE]],
        )  # fmt: skip
        self.model = self.decoder = randomised(
            transformers.LlavaOnevisionForConditionalGeneration(config)
        )
        save(self.model, folder)
        self.tokenizer.save_pretrained(folder)

    def expanded(self, text: str, clips: Sequence[np.ndarray], k: int) -> str:
        for clip in clips:
            grid = SIZE // 14
            if len(clip) == 1:
                text = text.replace("<image>", "<|here|>" * (grid**2 + 1), 1)
            else:
                tokens = -(-len(clip) // k) * (-(-grid // 2)) ** 2 + 1
                text = text.replace("<video>", "<video>" * tokens, 1)
        return text.replace("<|here|>", "<image>")

    def features(self, frames: np.ndarray, k: int) -> torch.Tensor:
        inner = self.model.model
        with torch.no_grad():
            hidden = inner.vision_tower(pixels_of(frames), output_hidden_states=True).hidden_states
            x = inner.multi_modal_projector(hidden[-1])
            x = x if len(frames) == 1 else groups_of(inner.apply_pooling(x), k)
            return torch.cat([x.flatten(0, 1), inner.image_newline[None]])

    def own(self, text: str, clips: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """The inputs of the model's own forward pass."""
        inputs = {"input_ids": self.ids(text, clips)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if len(clips[0]) > 1:
            return inputs | {"pixel_values_videos": pixels_of(clips[0])[None]}
        return inputs | {
            "pixel_values": torch.stack([pixels_of(clip) for clip in clips]),
            "image_sizes": torch.tensor([[SIZE, SIZE]] * len(clips)),
            "batch_num_images": torch.tensor([max(2, len(clips))]),  # several images: no tiles
        }

    def logits(self, text: str, clips: Sequence[np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return self.model(**self.own(text, clips)).logits[0].numpy()

    def greedy(self, text: str, clips: Sequence[np.ndarray]) -> list[int]:
        return self._generate(self.model, **self.own(text, clips))


class LlavaOriginal(_Llava):
    """The layout and the arithmetic of the original code.

    Args:
      pool: "average", "max" or "bilinear".
      position: mm_newline_position.
      merge: mm_patch_merge_type.
      has_times: add_time_instruction.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        pool: str,
        position: str,
        merge: str = "spatial_unpad",
        has_times: bool = False,
    ):
        self.has_times = has_times
        self.folder, self.method, self.position, self.merge = folder, pool, position, merge
        self.tokenizer = _tokenizer_with(["<image>", "<video>"])
        tower = make_tower()  # the last layer is not stored
        self.decoder = make_decoder("qwen2")
        self.projector = randomised(
            nn.Sequential(nn.Linear(24, 56), nn.GELU(), nn.Linear(56, 56)), seed=1
        )
        self.newline = torch.randn(56, generator=torch.Generator().manual_seed(2)) * 0.2
        self.tower = tower
        save(tower, folder / "tower")
        (folder / "tower/model.safetensors").unlink()
        tensors = dict(self.decoder.state_dict())
        for name, value in tower.state_dict().items():
            if ".layers.2." not in name and "head." not in name:
                name = name.removeprefix("vision_model.")
                tensors[f"model.vision_tower.vision_tower.vision_model.{name}"] = value
        for name, value in self.projector.state_dict().items():
            tensors[f"model.mm_projector.{name}"] = value
        if "unpad" in merge:
            tensors["model.image_newline"] = self.newline
        save_file(
            {k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors"
        )
        self.tokenizer.save_pretrained(folder)
        fields = self.decoder.config.to_diff_dict() | {
            "model_type": "llava" if has_times else "llava_qwen", "architectures": ["LlavaQwenForCausalLM"],
            "add_time_instruction": has_times, "mm_vision_tower": str(folder / "tower"), "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_spatial_pool_mode": pool,
            "mm_spatial_pool_stride": 2, "mm_newline_position": position, "mm_patch_merge_type": merge,
            "add_faster_video": False, "image_aspect_ratio": "anyres_max_9", "mm_resampler_type": None,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(fields))

    def expanded(self, text: str, clips: Sequence[np.ndarray], k: int) -> str:
        for clip in clips:
            name = "<image>" if len(clip) == 1 else "<video>"
            tokens = "<|here|>" * len(self.features(clip, k))
            if (
                self.has_times and len(clip) > 1
            ):  # the sentence of LLaVA's own demo, at a frame a second
                times = ",".join(f"{i:.2f}s" for i in range(len(clip)))
                tokens += (
                    f"\nThe video lasts for {len(clip) - 0.96:.2f} seconds, and {len(clip)} frames are uniformly sampled "
                    f"from it. These frames are located at {times}.Please answer the following questions related to "
                    f"this video."
                )
            text = text.replace(name, tokens, 1)
        return text.replace("<|here|>", "<image>")

    def features(self, frames: np.ndarray, k: int) -> torch.Tensor:
        with torch.no_grad():
            hidden = self.tower(pixels_of(frames), output_hidden_states=True).hidden_states
            x = self.projector(hidden[-2])  # [T, N, D]
        newline = self.newline[None]
        is_unpadded = "unpad" in self.merge
        if len(frames) == 1:
            return torch.cat([x[0], newline]) if is_unpadded else x[0]
        x = groups_of(self._pool(x), k)
        if self.merge == "flat" or self.position == "no_token":
            return x.flatten(0, 1)
        if self.position == "grid":
            rows = x.reshape(-1, round(x.shape[1] ** 0.5), 56)
            return torch.cat([torch.cat([row, newline]) for row in rows])
        if self.position == "frame":
            return torch.cat([torch.cat([frame, newline]) for frame in x])
        return torch.cat([x.flatten(0, 1), newline]) if is_unpadded else x.flatten(0, 1)

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        side = round(x.shape[1] ** 0.5)
        x = x.reshape(len(x), side, side, -1).permute(0, 3, 1, 2)
        if self.method == "average":
            x = nn.functional.avg_pool2d(x, 2)
        elif self.method == "max":
            x = nn.functional.max_pool2d(x, 2)
        else:
            x = nn.functional.interpolate(x, size=[-(-side // 2)] * 2, mode="bilinear")
        return x.flatten(2).transpose(1, 2)


# As in the files of SmolVLM2: videos are dropped.
_IMAGES_ONLY = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class SmolVLM(WithImageToken):
    """transformers' class, and the text of its processor."""

    stops = ("<end_of_utterance>", "<|endoftext|>")

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        tokens = [
            "<image>", "<video>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
        ]  # fmt: skip
        self.tokenizer = _tokenizer_with(tokens)
        from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

        rope = {"rope_type": "default", "rope_theta": 1e4}
        config = transformers.SmolVLMConfig(
            vision_config=_TOWER,
            text_config={"model_type": "llama", **BASE, "rope_parameters": rope, "pad_token_id": 0},
            scale_factor=2,
            image_token_id=self.tokenizer.convert_tokens_to_ids("<image>"),
        )
        self.model = self.decoder = randomised(transformers.SmolVLMForConditionalGeneration(config))
        save(self.model, folder)
        self.tokenizer.chat_template = _IMAGES_ONLY
        self.tokenizer.save_pretrained(folder)
        self.tokenizer.chat_template = (
            DEFAULT_CHAT_TEMPLATE  # what the processor renders for videos
        )
        sampling = {
            "video_sampling": {"max_frames": 8, "fps": 1, "video_size": {"longest_edge": SIZE}}
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(sampling))

    def content(self, text: str) -> list[dict[str, str]]:
        kinds = [found[1:-1] for found in PLACEHOLDER.findall(text)]
        words = PLACEHOLDER.split(text)[-1].strip()
        return [*({"type": kind} for kind in kinds), {"type": "text", "text": words}]

    def expanded(self, text: str, clips: Sequence[np.ndarray], k: int) -> str:
        from transformers.models.smolvlm import processing_smolvlm
        from transformers.video_utils import VideoMetadata

        processor = object.__new__(processing_smolvlm.SmolVLMProcessor)
        processor.fake_image_token, processor.image_token = "<fake_token_around_image>", "<image>"
        processor.global_image_token = "<global-img>"
        processor.image_seq_len = (SIZE // 14 // 2) ** 2
        for clip in clips:
            if len(clip) == 1:
                sizes = {"rows": [[0]], "cols": [[0]]}
                text = text.replace(
                    "<image>",
                    processor.replace_image_token(sizes, 0).replace("<image>", "<|here|>"),
                    1,
                )
                continue
            metadata = VideoMetadata(
                total_num_frames=len(clip), fps=1.0, frames_indices=list(range(len(clip))),
                duration=len(clip) - 0.96,
            )  # fmt: skip
            shape = {"pixel_values": torch.zeros(1, len(clip)), "video_metadata": [metadata]}
            words = processor.replace_video_token(shape, 0)
            if k > 1:
                start, *frames = words.split("\nFrame from ")
                frames[-1] = frames[-1].removesuffix("\n\n")
                words = "\nFrame from ".join([start, *frames[::k]]) + "\n\n"
            text = text.replace("<video>", words.replace("<image>", "<|here|>"), 1)
        return text.replace("<|here|>", "<image>")

    def features(self, frames: np.ndarray, k: int) -> torch.Tensor:
        inner = self.model.model
        with torch.no_grad():
            found = inner.get_image_features(
                pixels_of(frames)[None], return_dict=True
            ).pooler_output
        return groups_of(torch.cat(found).reshape(len(frames), -1, 56), k).flatten(0, 1)

    def own(self, text: str, clips: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        ids = self.ids(text, clips)
        pixels = torch.cat([pixels_of(clip) for clip in clips])[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def logits(self, text: str, clips: Sequence[np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return self.model(**self.own(text, clips)).logits[0].numpy()

    def greedy(self, text: str, clips: Sequence[np.ndarray]) -> list[int]:
        return self._generate(self.model, **self.own(text, clips))


FAMILIES: dict[str, Callable[[pathlib.Path], Reference]] = {
    "NVILA (mlp_downsample_2x2_fix)": lambda f: Vila(f, "mlp_downsample_2x2_fix"),
    "NVILA (mlp_downsample_3x3_fix)": lambda f: Vila(f, "mlp_downsample_3x3_fix", (8, 2)),
    "VILA (linear)": lambda f: Vila(f, "linear", (3, 2)),
    "LLaVA-OneVision": LlavaOneVision,
    "LLaVA-OneVision (original)": lambda f: LlavaOriginal(f, "bilinear", "one_token"),
    "LLaVA-Video (original)": lambda f: LlavaOriginal(f, "average", "grid", has_times=True),
    "SmolVLM2": SmolVLM,
}
