"""STORM as a model of lmms-eval: with a stub of its interface, and (slow) with the real package."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import tomllib
import types

import numpy as np
import pytest
from PIL import Image

import storm_jax
from storm_jax.evals import lmms_eval
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.inference.generate import Sampling
from storm_jax.media.media import Media
from storm_jax.text.sample import Sample, Turn

ROOT = pathlib.Path(__file__).parents[2]
VERSION = "0.7.3"
# What its import needs. The package itself requires much more, and an older PyAV.
NEEDED = (
    "torch==2.13.0", "loguru", "accelerate", "datasets", "evaluate", "pytz", "tenacity", "sacrebleu",
    "httpx", "openai", "numexpr", "pytablewriter", "wandb==0.25.0", "jsonlines", "scikit-learn",
    "sympy", "latex2sympy2", "python-dotenv", "pydantic", "filelock<3.20",
)  # fmt: skip


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture
def model_module(monkeypatch):
    """The module of the model class, imported with a stub of lmms-eval's interface."""

    class Lmms:
        is_simple = True

        def __init__(self):
            self.task_dict = {}
            self.cached = []
            self.cache_hook = types.SimpleNamespace(
                add_partial=lambda *item: self.cached.append(item)
            )

    def manifest(model_id, simple_class_path):
        return types.SimpleNamespace(model_id=model_id, simple_class_path=simple_class_path)

    stubs = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"Instance": Request},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": manifest},
    }
    for name, members in stubs.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    path = f"{lmms_eval.__name__}.model"
    monkeypatch.delitem(sys.modules, path, raising=False)
    yield importlib.import_module(path)
    sys.modules.pop(path)


@pytest.mark.slow
def test_requests_are_answered_as_the_predictor_answers(model_module, trained_run, shapes_folder):
    video = str(next((shapes_folder / "media/test").glob("*.mp4")))
    picture = Image.fromarray(np.full((20, 30, 3), 90, np.uint8))
    docs = [[video], [[picture, picture]], ["nothing.mp4"], None, video]
    model = model_module.StormForLmmsEval(str(trained_run), temporal_sample=2, batch_size="4")
    model.task_dict = {"task": {"test": docs}}
    short, long = {"max_new_tokens": 3}, {"max_new_tokens": 9, "until": ["e", "\n\n"]}
    requests = [
        Request(f"What <video>{i}?", short if i % 2 else long, lambda doc: doc, i, "task", "test")
        for i in range(5)
    ]
    replies = model.generate_until(requests)
    assert replies[2] == ""
    assert sorted(item[1][0] for item in model.cached) == [f"What <video>{i}?" for i in range(5)]
    storm = storm_jax.load(trained_run)
    compression = dataclasses.replace(storm.compression, temporal_sample=2)
    for i in (0, 3, 4):
        media = (Media.file("video", video),) if i != 3 else ()
        text = f"<video>\nWhat {i}?" if media else f"What {i}?"
        sample = Sample(id="1", turns=(Turn("user", text),), media=media, extra={})
        sampling = Sampling(3 if i % 2 else 9)
        [(_, alone)] = storm.predict([sample], compression=compression, sampling=sampling)
        assert replies[i] == (alone.text if i % 2 else alone.text.split("e")[0].split("\n\n")[0])
    with pytest.raises(NotImplementedError, match="--answers=likelihood"):
        model.loglikelihood(requests)


def test_the_manifest_names_the_class(model_module):
    found = lmms_eval.manifest()
    module, _, name = found.simple_class_path.rpartition(".")
    assert found.model_id == "storm_jax"
    assert getattr(importlib.import_module(module), name) is model_module.StormForLmmsEval
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["lmms_eval.models"]
    assert points == {"storm_jax": f"{lmms_eval.__name__}:manifest"}


def test_the_manifest_does_not_import_jax():
    code = (
        "import sys, types\n"
        "stub = types.ModuleType('lmms_eval.models.registry_v2')\n"
        "stub.ModelManifest = lambda **fields: fields\n"
        "for name in ('lmms_eval', 'lmms_eval.models'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "sys.modules['lmms_eval.models.registry_v2'] = stub\n"
        "from storm_jax.evals.lmms_eval import manifest\n"
        "assert manifest()['model_id'] == 'storm_jax'\n"
        "assert not {'jax', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_nothing_else_imports_it():
    importing = [
        str(path.relative_to(ROOT / "storm_jax/evals/lmms_eval"))
        for path in sorted((ROOT / "storm_jax").rglob("*.py"))
        if re.search(r"^\s*(from|import) lmms_eval", path.read_text(), re.MULTILINE)
    ]
    assert importing == ["__init__.py", "model.py"]
    assert "lmms" not in (ROOT / "requirements.txt").read_text()


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """Python of an environment with lmms-eval and this project; LMMS_EVAL_PYTHON selects an existing one."""
    if "LMMS_EVAL_PYTHON" in os.environ:
        return os.environ["LMMS_EVAL_PYTHON"]
    folder = tmp_path_factory.mktemp("lmms") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *NEEDED], check=True)
    subprocess.run([*pip, "--no-deps", f"lmms-eval=={VERSION}"], check=True)
    subprocess.run([*pip, "-r", ROOT / "requirements.txt"], check=True)
    subprocess.run([*pip, "--no-deps", "-e", ROOT], check=True)
    return str(folder / "bin/python")


TASK = """\
task: storm_clips
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function clips.doc_to_visual
doc_to_text: !function clips.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
process_results: !function clips.process_results
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """\
def doc_to_visual(doc):
    return [doc["path"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_harness_drives_a_run(python, trained_run, shapes_folder, tmp_path):
    """All rows but one have the predictor's reply as their answer; the harness must count them as right."""
    storm = storm_jax.load(trained_run)
    videos = sorted((shapes_folder / "media/test").glob("*.mp4"))[:3]
    rows = []
    for i in range(6):
        question, path = f"Which came first, {i}?", videos[i % 3]
        answer = storm.answer(path, question, sampling=Sampling(8)) if i else "wrong"
        rows.append({"path": str(path), "question": question, "answer": answer})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "task").mkdir()
    (tmp_path / "task/clips.yaml").write_text(TASK.format(rows=tmp_path / "rows.json"))
    (tmp_path / "task/clips.py").write_text(FUNCTIONS)
    done = subprocess.run(
        [
            python, "-m", "lmms_eval", "--model", "storm_jax",
            "--model_args", f"workdir={trained_run}", "--tasks", "storm_clips",
            "--include_path", str(tmp_path / "task"), "--batch_size", "4",
            "--output_path", str(tmp_path / "out"), "--log_samples",
        ],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (results,) = (tmp_path / "out").rglob("*results.json")
    found = json.loads(results.read_text())["results"]["storm_clips"]
    assert found["exact,none"] == pytest.approx(5 / 6)


# Compares parsers on random replies, and prompts of the same rows.
COMPARE = """
import importlib, json, os, random, sys
import types
for name in ("decord", "cv2"):  # readers of videos, which nothing here reads
    sys.modules[name] = types.ModuleType(name)
sys.modules["decord"].VideoReader = sys.modules["decord"].cpu = None
random.choice = lambda choices: None  # where theirs guesses, ours says nothing
os.environ.setdefault("HF_HOME", "/tmp")
from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
from lmms_eval.tasks.mvbench.utils import mcq_acc, mvbench_doc_to_text
from lmms_eval.tasks.longvideobench.utils import parse_multi_choice_response, longvideobench_doc_to_text
from lmms_eval.tasks.videomme.utils import videomme_doc_to_text
from lmms_eval.tasks.mlvu.utils import mlvu_doc_to_text
from lmms_eval.tasks.egoschema import utils as ego
import yaml, lmms_eval, pathlib
from storm_jax.media.media import Media
from storm_jax.evals import parsing
from storm_jax.evals.benchmark import Question
from storm_jax.evals.benchmarks import BENCHMARKS
options = ("red car", "blue", "a man", "dog", "the sea")
lines = tuple(f"{x}. {o}" for x, o in zip("ABCDE", options))
def question(count, key, groups={}):
    return Question(id="1", video="v", media=Media(kind="video", name="v"), text="Why?",
                    options=options[:count], answer=key, groups=groups, lines=lines[:count])
words = ["A","B","C","D","E","F","a","b","(A)","(B)","B.","C.","D)","A:","the answer is","answer",
         "The best answer is","Answer:","Best option:","a man","red car","blue","is","because","\\n",".",
         ",","(",")","I choose","1,000","3.5","The best option is","-","/","'","correct choice is"]
rng = random.Random(0)
for _ in range(20000):
    reply = rng.choice([" ", ""]).join(rng.choices(words, k=rng.randint(0, 9)))
    q4, q5 = question(4, "B"), question(5, "B")
    assert (parsing.extract_mcq("ABCD")(reply, q4) or "") == extract_mcq_answer(reply, list("ABCD")), reply
    for key in "ABCDE":
        assert (parsing.letter_in_text(reply, q5) == key) == bool(mcq_acc(key, reply)), reply
    assert parsing.first_letter(reply, q5) == parse_multi_choice_response(reply, list("ABCDE"), {}), reply
    theirs = ego.parse_multi_choice_response(reply, list("ABCDE"), dict(zip("ABCDE", lines)))[0]
    assert parsing.mmmu(reply, q5) == theirs, reply
def kwargs(path):
    text = (pathlib.Path(lmms_eval.__file__).parent / "tasks" / path).read_text()
    plain = "\\n".join(line for line in text.splitlines() if "!function" not in line)
    return yaml.safe_load(plain)["lmms_eval_specific_kwargs"]["default"]
def ours(name, q):
    return BENCHMARKS[name].prompts["lmms"](q).turns[-1].text.removeprefix("<video>\\n")
doc = {"question": "Why?", "options": lines[:4], "candidates": options[:4], "option": lines}
assert ours("videomme", question(4, "A")) == videomme_doc_to_text(doc, kwargs("videomme/videomme.yaml"))
assert ours("mvbench", question(4, "A")) == mvbench_doc_to_text(
    doc, kwargs("mvbench/mvbench_action_count.yaml"))
listed = "Why?\\n" + "\\n".join(f"({x}) {o}" for x, o in zip("ABCD", options))
assert ours("mlvu", question(4, "A")) == mlvu_doc_to_text(
    {"question": listed}, kwargs("mlvu/mlvu_dev.yaml"))
assert ours("egoschema", question(5, "A")) == ego.egoschema_doc_to_text(doc, {})
padded = {f"option{i}": o for i, o in enumerate((*options[:4], "N/A"))}
assert ours("longvideobench", question(4, "A")) == longvideobench_doc_to_text(
    {"question": "Why?", **padded}, kwargs("longvideobench/longvideobench_val_v.yaml"))
print("alike")
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_prompts_and_parsers_are_ours(python, tmp_path):
    (tmp_path / "compare.py").write_text(textwrap.dedent(COMPARE))
    assert set(BENCHMARKS) >= {"videomme", "mvbench", "mlvu", "egoschema", "longvideobench"}
    done = subprocess.run(
        [python, tmp_path / "compare.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("alike\n"), done.stderr[-3000:]
