"""What is shipped: a quick import, and a wheel and sdist that an empty environment can use."""

from __future__ import annotations

import configparser
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

ROOT = Path(__file__).parents[1]
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


def test_the_import_takes_less_than_half_a_second():
    """Of processor time beyond numpy and gymnasium's own, so that a busy machine does not matter; the best of three."""
    program = (
        "import time, gymnasium, numpy; before = time.process_time(); import textgen_env;"
        "print(time.process_time() - before)"
    )
    whole = "import time; before = time.process_time(); import textgen_env; print(time.process_time() - before)"
    assert min(float(run(sys.executable, "-c", program, cwd=ROOT)) for _ in range(3)) < 0.1
    assert min(float(run(sys.executable, "-c", whole, cwd=ROOT)) for _ in range(3)) < 0.5


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
