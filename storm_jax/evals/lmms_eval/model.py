"""STORM as a model of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval), for runs of its own harness:

    python -m storm_jax.evals.lmms_eval_plugin --model storm_jax --model_args workdir=runs/sft,num_frames=64 --tasks mvbench --batch_size 32

It takes the arguments of `lmms-eval`, with one more model. Nothing else here imports lmms-eval.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from storm_jax.evals.questions import without_placeholders
from storm_jax.inference.generate import Sampling
from storm_jax.inference.predictor import Predictor
from storm_jax.media.image import IMAGE_SUFFIXES
from storm_jax.media.media import Media
from storm_jax.text.sample import Sample, Turn

NAME = "storm_jax"


class StormForLmmsEval(lmms):
    """A run that answers the requests of lmms-eval.

    Args:
      workdir, step: as of `Predictor`.
      compression: fields of `CompressionConfig`, such as num_frames; as in training by default.
      batch_size: questions answered together, all of which may be about one video.
      device: ignored; JAX uses all devices that it sees.
    """

    is_simple = True

    def __init__(
        self,
        workdir: str,
        step: int | None = None,
        batch_size: int | str = 32,
        device: str | None = None,
        **compression: int,
    ):
        super().__init__()
        self._predictor = Predictor(workdir, step)
        self._compression = dataclasses.replace(self._predictor.compression, **compression)
        self._batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Replies in the order of the requests; one whose media cannot be read has an empty reply, and
        the reason is logged."""
        replies = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(number)
        for numbers in alike.values():
            options = requests[numbers[0]].args[1]
            samples = [self._sample(number, requests[number]) for number in numbers]
            answered = self._predictor.predict(
                samples,
                compression=self._compression,
                sampling=_sampling(options),
                batch_size=self._batch_size,
            )
            for index, prediction in answered:
                request = requests[numbers[index]]
                if prediction.error:
                    logging.warning("no reply: %s", prediction.error)
                text = _cut(prediction.text, options.get("until") or ())
                replies[numbers[index]] = text
                self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return replies

    def _sample(self, number: int, request: Instance) -> Sample:
        """The media of a request, one behind another, and its text."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        media = tuple(
            _medium(f"{task} {doc_id}", visual)
            for visual in _flat(doc_to_visual(self.task_dict[task][split][doc_id]))
        )
        shown = "".join(f"<{medium.kind}>\n" for medium in media)
        turn = Turn("user", shown + without_placeholders(context))
        return Sample(id=str(number), turns=(turn,), media=media, extra={})

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            f"{NAME} generates replies only; python eval.py --answers=likelihood scores letters"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError(f"{NAME} answers one question at a time")


def _flat(visuals: Any) -> list[Any]:
    """lmms-eval gives one, a list of them, or a list of lists."""
    if visuals is None:
        return []
    if not isinstance(visuals, (list, tuple)):
        return [visuals]
    return [each for visual in visuals for each in _flat(visual)]


def _medium(name: str, visual: Any) -> Media:
    """A file, or a picture that the task has opened."""
    if isinstance(visual, Image.Image):
        data = io.BytesIO()
        visual.convert("RGB").save(data, "png")
        return Media(kind="image", name=f"image of {name}", data=data.getvalue())
    if not isinstance(visual, str):
        raise TypeError(
            f"{name} shows a {type(visual).__name__}, and only images and videos are read"
        )
    is_image = pathlib.Path(visual).suffix.lower() in IMAGE_SUFFIXES
    return Media.file("image" if is_image else "video", visual)


def _sampling(options: Mapping[str, Any]) -> Sampling:
    is_greedy = not options.get("do_sample", False)
    return Sampling(
        int(options.get("max_new_tokens") or 128),
        0.0 if is_greedy else float(options.get("temperature") or 0.0),
        float(options.get("top_p") or 1.0),
    )


def _cut(text: str, until: str | Sequence[str]) -> str:
    """The text before whatever ends it."""
    for end in [until] if isinstance(until, str) else until:
        text = text.split(end)[0] if end else text
    return text


def register() -> None:
    """Adds the model to lmms-eval's registry."""
    from lmms_eval.models import MODEL_REGISTRY_V2

    path = f"{__name__}.{StormForLmmsEval.__name__}"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest(NAME, simple_class_path=path), overwrite=True)


def main() -> None:
    from lmms_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()


if __name__ == "__main__":
    # As a module of its own name: the registry imports it by that.
    from storm_jax.evals import lmms_eval_plugin

    lmms_eval_plugin.main()
