"""Pretrained weights in and out: Hugging Face safetensors <-> runs.

    mapping        which tensor is which parameter, in which layout; one table for both ways
    architecture   config.json <-> VisionConfig, DecoderConfig
    tensors        folders of safetensors: read lazily, written in shards
    output         a folder that is written whole or not at all
    importer       a tower, a decoder and perhaps a projector -> a run at step 0
    exporter       a run -> three folders

`python -m storm_jax.weights --help`
"""

from collections.abc import Sequence


class WeightsError(ValueError):
    """Weights that are not what they should be; every problem found is in the message."""

    def __init__(self, subject: str, problems: Sequence[str] = ()):
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        super().__init__("\n  ".join([subject, *problems[:20], *more]))
