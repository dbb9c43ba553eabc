"""The class that answers requests of lmms-eval."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

from storm_jax.evals.benchmark import without_placeholders
from storm_jax.evals.lmms_eval import NAME
from storm_jax.inference.generate import Sampling
from storm_jax.inference.predictor import Predictor, kind_of
from storm_jax.media.media import Media
from storm_jax.text.sample import Sample, Turn


class StormForLmmsEval(lmms):
    """A run that answers requests of lmms-eval.

    Args:
      workdir, step: as in `Predictor`.
      batch_size: questions answered together.
      device: ignored; JAX uses all visible devices.
      compression: fields of `CompressionConfig`, e.g. num_frames; each defaults to its value in training.
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
        """Replies in the order of the requests. If media cannot be read, the reply is empty and the reason is
        logged."""
        replies = [""] * len(requests)
        by_options: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_options[json.dumps(request.args[1], sort_keys=True, default=str)].append(number)
        for numbers in by_options.values():
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
                text = _truncate(prediction.text, options.get("until") or ())
                replies[numbers[index]] = text
                self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return replies

    def _sample(self, number: int, request: Instance) -> Sample:
        """The media of a request in order, followed by its text."""
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
            f"{NAME} only generates replies; python eval.py --answers=likelihood scores letters"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError(f"{NAME} does not support conversations of several rounds")


def _flat(visuals: Any) -> list[Any]:
    """Flattens what tasks return: one medium, a list of them, or a list of lists."""
    if visuals is None:
        return []
    if not isinstance(visuals, (list, tuple)):
        return [visuals]
    return [each for visual in visuals for each in _flat(visual)]


def _medium(name: str, visual: Any) -> Media:
    """A file, or an image that the task has opened.

    Raises:
      TypeError: for anything else.
    """
    if isinstance(visual, Image.Image):
        data = io.BytesIO()
        visual.convert("RGB").save(data, "png")
        return Media(kind="image", name=f"image of {name}", data=data.getvalue())
    if not isinstance(visual, str):
        raise TypeError(
            f"{name} has a {type(visual).__name__}; only images and paths of videos are supported"
        )
    return Media.file(kind_of(visual), visual)


def _sampling(options: Mapping[str, Any]) -> Sampling:
    is_greedy = not options.get("do_sample", False)
    return Sampling(
        int(options.get("max_new_tokens") or 128),
        0.0 if is_greedy else float(options.get("temperature") or 0.0),
        float(options.get("top_p") or 1.0),
    )


def _truncate(text: str, until: str | Sequence[str]) -> str:
    """The text before the first stop string."""
    for end in [until] if isinstance(until, str) else until:
        text = text.split(end)[0] if end else text
    return text
