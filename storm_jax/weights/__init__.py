"""Import and export of pretrained weights: Hugging Face safetensors <-> runs.

    mapping        which tensor is which parameter, in which layout; one table for both directions
    architecture   config.json <-> VisionConfig, DecoderConfig
    tensors        folders of safetensors: read lazily, written in shards
    output         output folders that are complete or absent
    importer       a tower, a decoder and optionally a projector -> a run at step 0
    whole          what a family says of a whole video model; the families are vila, llava, smolvlm and storm
    tokenizer      the tokenizer of an imported run
    exporter       a run -> three folders, or one that PyTorch runs
    one_folder     the files next to the weights in that folder; its code is in hf
    card           its README.md
    push           uploads it

`python -m storm_jax.weights --help`
"""

from collections.abc import Sequence

_MAX_LISTED = 20


class WeightsError(ValueError):
    """Weights that cannot be imported or exported; the message lists the problems found."""

    def __init__(self, subject: str, problems: Sequence[str] = ()):
        lines = [subject, *problems[:_MAX_LISTED]]
        if len(problems) > _MAX_LISTED:
            lines.append(f"and {len(problems) - _MAX_LISTED} more")
        super().__init__("\n  ".join(lines))
