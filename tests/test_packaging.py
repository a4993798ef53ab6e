"""What is shipped: a light import, and a wheel and sdist that an empty environment can use."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import textgen_env
from textgen_env.errors import ConfigError

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
PACKAGES = ("textgen_env", "agents")
SHIPPED = sorted(
    str(path.relative_to(ROOT))
    for package in PACKAGES
    for path in (ROOT / package).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
)


def run(*command, **settings):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_import_loads_no_package_but_numpy_gymnasium_and_psutil():
    """What makes it quick: torch, transformers and the like load when a model or an agent does."""
    program = """
import sys
before = set(sys.modules)
import textgen_env
new = [name for name in set(sys.modules) - before if "." not in name and name not in sys.stdlib_module_names]
print(*(name for name in new if getattr(sys.modules[name], "__file__", None)))
"""
    loaded = set(run(sys.executable, "-c", program, cwd=ROOT).split())
    assert {"textgen_env", "gymnasium", "numpy"} <= loaded
    assert loaded <= {"textgen_env", "gymnasium", "numpy", "psutil", "farama_notifications", "typing_extensions"}


def test_every_requirement_is_pinned_and_every_pin_satisfies_its_requirement():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    for line in "\n".join(wanted).split("\n"):
        if line.strip() and not line.startswith("textgen-env"):
            requirement = Requirement(line)
            version = pins.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement.name} is not in constraints.txt"
            assert requirement.specifier.contains(version), (line, version)


TRACKERS = ("trackio", "wandb")


def extras():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return {name: lines.split("\n")[1:] for name, lines in config["options.extras_require"].items()}


def test_all_is_every_extra_and_dev_is_all_and_the_tools():
    features = sorted(set(extras()) - {"all", "dev", "docs", *TRACKERS})  # the site and services are for those who ask
    assert extras()["all"] == [f"textgen-env[{','.join(features)}]"]
    assert extras()["dev"][0] == "textgen-env[all]"


def test_the_changelog_has_the_version_and_its_date():
    assert re.search(rf"^## \[{re.escape(textgen_env.__version__)}\] - \d{{4}}-\d\d-\d\d$", CHANGELOG, re.MULTILINE)


# --- extras: a feature without its package names the extra, everything else works


class Hiding:
    """An import hook in front of all others that finds everything but some packages."""

    def __init__(self, packages):
        self.packages, self.finders = packages, list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders if hasattr(finder, "find_spec"))
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, context):
        for finder in self.finders:
            yield from getattr(finder, "find_distributions", lambda context: ())(context)


@pytest.fixture
def hide(monkeypatch):
    def hide(*packages):
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Hiding(packages)])

    return hide


def train_a_classifier(folder):
    from textgen_env.rewards.classifier import train_classifier

    examples = [("good" if i % 2 else "bad", "a fine day" if i % 2 else "a grey day") for i in range(20)]
    train_classifier(examples, folder / "words.json")


def make_reward(spec):
    return lambda folder: textgen_env.make_reward(spec)


def compute(metric):
    def run(folder):
        from textgen_env.metrics import METRICS

        METRICS[metric]().compute(predictions=["a b", "a c"], references=["a b", "a c"])

    return run


def convert_a_gguf(folder):
    from textgen_env.models import load_pretrained

    (folder / "model.gguf").write_bytes(b"GGUF")
    load_pretrained(str(folder / "model.gguf"), "float32")


def make_an_agent(folder):
    from agents.zoo import Budget, make_agent

    env = textgen_env.TextGenVectorEnv(2, observation="full", max_new_tokens=2)
    make_agent("qrdqn", env, 0, Budget(8, 4))


def train_with_adapters(folder):
    from agents import PrunedTransformerExtractor

    space = textgen_env.TextGenEnv(observation="full", max_new_tokens=2).observation_space
    PrunedTransformerExtractor(space, source="tokens", model="tiny", trainable="lora")


def open_a_dataset(folder):
    from agents.text_dqn.offline import open_dataset

    open_dataset(folder)


def connect(folder):
    from agents.distributed.connection import import_ray

    import_ray()


def open_the_playground(folder):
    from agents.playground.page import load_gradio

    load_gradio()


def track_by(name):
    def train(folder):
        from agents.runs.run import RunConfig, train

        train(RunConfig(steps=64), folder / "run", track=name)

    return train


WITHOUT = [
    ("classifier", "sklearn", train_a_classifier),
    ("contrib", "sb3_contrib", make_an_agent),
    ("distributed", "ray", connect),
    ("gguf", "gguf", convert_a_gguf),
    ("gguf", "accelerate", convert_a_gguf),
    ("lora", "peft", train_with_adapters),
    ("minari", "minari", open_a_dataset),
    ("minari", "h5py", open_a_dataset),
    ("play", "gradio", open_the_playground),
    ("references", "sacrebleu", make_reward("bleu")),
    ("references", "sacrebleu", make_reward("chrf")),
    ("references", "rouge_score", make_reward("rouge")),
    ("references", "sacrebleu", compute("bleu")),
    ("references", "sacrebleu", compute("chrf")),
    ("references", "rouge_score", compute("rouge")),
    ("references", "sacrebleu", compute("self_bleu")),
    ("structure", "regex", make_reward({"name": "regex", "pattern": "a+"})),
    ("structure", "regex", make_reward({"name": "json", "schema": {}})),
    ("structure", "jsonschema", make_reward({"name": "json", "schema": {}})),
    ("tensorboard", "tensorboard", track_by("tensorboard")),
    ("trackio", "trackio", track_by("trackio")),
    ("wandb", "wandb", track_by("wandb")),
]


OPTIONAL = sorted({package for _, package, _ in WITHOUT} - {"regex"})  # transformers needs regex


@pytest.mark.parametrize(("extra", "package", "use"), WITHOUT)
def test_a_feature_without_its_package_names_the_extra(hide, tmp_path, monkeypatch, extra, package, use):
    monkeypatch.setenv("TEXTGEN_CACHE", str(tmp_path / "cache"))
    hide(package)
    assert importlib.util.find_spec(package) is None
    with pytest.raises(ConfigError, match=rf"needs {package}.*: pip install 'textgen-env\[{extra}\]'"):
        use(tmp_path)


def test_every_extra_but_the_clients_has_a_feature_that_fails_without_it():
    # Clients are other software that uses the environments.
    assert {extra for extra, *_ in WITHOUT} == set(extras()) - {"all", "dev", "docs", "clients"}


def test_the_lists_of_names_need_no_extra(hide):
    from typer.testing import CliRunner

    from agents.cli.app import app

    hide(*OPTIONAL)
    listed = CliRunner().invoke(app, ["list"])
    assert listed.exit_code == 0, listed.output.splitlines()[-2:]


@pytest.mark.slow
def test_a_run_needs_no_extra(tmp_path):
    """It trains, reports and draws; without TensorBoard it writes no events, and says so once."""
    program = f"""
import sys
from test_packaging import Hiding
sys.meta_path[:] = [Hiding({OPTIONAL!r})]
from rich.console import Console
from agents.runs.run import RunConfig, train
train(RunConfig(steps=64, envs=4, eval_prompts=2, eval_texts=4, eval_samples=2), "run", console=Console())
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path}
    said = run(sys.executable, "-c", program, cwd=tmp_path, env=environment)
    assert said.count("textgen-env[tensorboard]") == 1
    assert (tmp_path / "run" / "metrics.csv").is_file()
    assert not (tmp_path / "run" / "tensorboard").exists()


# --- wheel and sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist, built from a copy of the sources without what lies around."""
    folder = tmp_path_factory.mktemp("build")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    program = "from setuptools import build_meta as b; print(b.build_sdist('dist')); print(b.build_wheel('dist'))"
    run(sys.executable, "-c", program, cwd=folder)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_file_of_the_packages_and_no_other_package(built):
    wheel, sdist = built
    assert wheel.name.split("-")[1] == textgen_env.__version__
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(names) == SHIPPED
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {*SHIPPED, "README.md", "LICENSE", "pyproject.toml", "setup.cfg"} <= held
    assert not [name for name in held if re.match("(tests|benchmarks|examples|scripts|docs)/", name)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_built_installs_into_an_empty_environment_and_passes_the_contract(built, tmp_path, kind):
    """The environment borrows the installed dependencies by a path; the project itself comes from the archive."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # without its editable installs
    archive = built[0] if kind == "wheel" else built[1]
    install = (
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--ignore-installed",
    )
    run(sys.executable, *install, "--target", site, archive, cwd=tmp_path)
    program = """
import textgen_env
from textgen_env import TableModel, TextGenEnv, TextGenVectorEnv, make_reward
from textgen_env.testing import check_env, check_language_model, check_reward, check_vector_env
coin = TableModel(["H", "T"], [0.5, 0.5], end=None)
settings = {"model": coin, "prompts": ["H", "T"], "reward": "length", "top_k": 2, "max_new_tokens": 4}
check_language_model(coin, ("H", "TT"))
check_reward(make_reward("length"))
check_env(TextGenEnv(**settings))
check_vector_env(TextGenVectorEnv(3, **settings), lambda: TextGenEnv(**settings))
print(textgen_env.__file__)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    assert run(python, "-c", program, cwd=tmp_path, env=environment).strip().startswith(site)
    script = (
        "from agents.cli.app import app; from typer.testing import CliRunner;"
        "print(CliRunner().invoke(app, ['--help']).exit_code)"
    )
    assert run(python, "-c", script, cwd=tmp_path, env=environment).strip() == "0"
