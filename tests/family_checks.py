"""Compares imported models with their torch references, and prints the table of docs/weights.md:

python -m tests.family_checks
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import families
import numpy as np
import transformers
from families import Reference
from reference_models import config_for, encoder_of, packed_logits

import storm_jax
from storm_jax.config import RunConfig
from storm_jax.data.rows import RowSample
from storm_jax.inference.generate import Sampling
from storm_jax.run import Run
from storm_jax.text.sample import Sample
from storm_jax.weights.importer import Sources, import_run

Samples = Sequence[tuple[Sample, list[np.ndarray]]]


def run_config() -> RunConfig:
    config = config_for(
        model__vision__image_size=28,  # the tower's own is taken
        model__dtype="float32",
        compression__num_frames=8,
        data__rows=[{"tokens": 512, "frames": 16}],
    )
    mamba = dataclasses.replace(config.model.mamba, head_dim=16)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, mamba=mamba))


def import_family(
    reference: Reference, out: pathlib.Path, *, pool: int = 0, add_mixer: str = ""
) -> Run:
    """Imports a model; `pool` replaces its own temporal pooling."""
    config, explicit = run_config(), []
    if pool:
        compression = dataclasses.replace(config.compression, temporal_pool=pool)
        config = dataclasses.replace(config, compression=compression)
        explicit = ["compression.temporal_pool"]
    import_run(config, Sources(model=str(reference.folder)), out, explicit, add_mixer)
    return Run(out)


def our_logits(run: Run, samples: Samples) -> list[np.ndarray]:
    """Logits of samples packed into one row."""
    encoder = encoder_of(run)
    encoded = [encoder.encode(s, [np.arange(len(c)) * 1.0 for c in clips]) for s, clips in samples]
    for (sample, clips), found in zip(samples, encoded, strict=True):
        assert len(encoder.plan(sample, [len(clip) for clip in clips])) >= len(found)
    rows = [
        RowSample(each, clips, encoder.compression)
        for each, (_, clips) in zip(encoded, samples, strict=True)
    ]
    return packed_logits(run, rows)


def logits_error(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Largest difference, relative to the largest logit."""
    errors = []
    for found, expected in zip(ours, theirs, strict=True):
        # The last newline of a template is no part of our rows.
        assert 0 <= len(expected) - len(found) <= 2, (len(expected), len(found))
        error = np.abs(found - expected[: len(found)]).max() / np.abs(expected).max()
        errors.append(float(error))
    return max(errors)


def their_logits(reference: Reference, samples: Samples, pool: int = 0) -> list[np.ndarray]:
    """Logits of the model itself, or with k = `pool` frames per group, averaged by hand."""
    texts = [reference.rendered(sample, opened=False) for sample, _ in samples]
    pairs = [(text, clips) for text, (_, clips) in zip(texts, samples, strict=True)]
    if not pool:
        return [reference.logits(text, clips) for text, clips in pairs]
    inputs = [reference.inputs(text, clips, pool) for text, clips in pairs]
    return [reference.logits_from(x) for x in inputs]


def differing_answers(reference: Reference, run: Run, samples: Samples) -> list[str]:
    """The questions whose greedy answers differ from torch."""
    storm = storm_jax.load(run.path)
    prompts = [sample.prompt() for sample, _ in samples]
    answered = dict(storm.predict(prompts, sampling=Sampling(families.NEW)))
    wrong = []
    for index, (sample, clips) in enumerate(samples):
        ids = reference.greedy(reference.rendered(sample, opened=True), clips)
        expected = reference.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if answered[index].error or answered[index].text != expected:
            wrong.append(
                f"{sample.id}: {answered[index].error or answered[index].text!r}, {expected!r}"
            )
    return wrong


def main() -> None:
    transformers.logging.set_verbosity_error()
    print("| family | logits | greedy answers | k = 3 on top | `--add_mixer` |")
    print("| --- | --- | --- | --- | --- |")
    chosen = sys.argv[1:] or list(families.FAMILIES)
    for name in chosen:
        make = families.FAMILIES[name]
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            media = families.write_media(path / "media")
            samples = [families.sample_of(question, media) for question in families.QUESTIONS]
            reference = make(path / "model")
            run = import_family(reference, path / "run")
            found = our_logits(run, samples)
            error = logits_error(found, their_logits(reference, samples))
            wrong = differing_answers(reference, run, samples)
            pooled = import_family(reference, path / "pooled", pool=3)
            pooled_error = logits_error(
                our_logits(pooled, samples), their_logits(reference, samples, 3)
            )
            added = []
            for mixer in ("mamba1", "mamba2"):
                with_mixer = our_logits(
                    import_family(reference, path / mixer, add_mixer=mixer), samples
                )
                same = all(np.array_equal(a, b) for a, b in zip(with_mixer, found, strict=True))
                added.append("same bits" if same else f"{logits_error(with_mixer, found):.0e}")
        answers = f"{len(samples) - len(wrong)} of {len(samples)}"
        print(
            f"| {name} | {error:.0e} | {answers} | {pooled_error:.0e} | {', '.join(added)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
