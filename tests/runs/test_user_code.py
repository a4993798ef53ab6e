"""Rewards, models and prompts of a user's own, named at the command line, run where they should, and nowhere else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from forked import CONTEXT
from safetensors.torch import load_file
from typer.testing import CliRunner

from agents.cli.app import app
from agents.runs.config import RunConfig
from agents.runs.run import load_run, resume, train
from agents.runs.stored import kept_prompts, located, portable, read_config
from agents.user_code import KNOWN_CODE_FILE, identify, is_reference, load_code, remember, replace_references
from textgen_env.errors import ConfigError, RewardError
from textgen_env.prompts import make_prompts
from textgen_env.rewards import Generation, make_reward

pytestmark = pytest.mark.usefixtures("blank_pictures")
SCORE = """
from pathlib import Path
from my_words import WORDS

Path(__file__).with_name("it ran").touch()

def score(completion):
    return float(sum(word in WORDS for word in completion.split()))

def prompts(rng):
    return f"the {['film', 'long film'][rng.integers(2)]} was"

def model():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = Path(__file__).with_name("model")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
"""
SIZES = {"max_prompt_tokens": 8, "max_new_tokens": 4, "min_new_tokens": 0, "top_k": 4}
SMALL = ("--max-prompt-tokens", 8, "--max-new-tokens", 4, "--top-k", 4, "--texts", 8, "--samples", 4, "--envs", 4)


def textgen(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No code that this user has named before."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TEXTGEN_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def made_once(tiny_lm, tmp_path_factory):
    """A folder with a script of one's own, a model, prompts, and a run with the script's reward."""
    folder = tmp_path_factory.mktemp("project")
    for part in tiny_lm:
        part.save_pretrained(folder / "model")
    (folder / "my_reward.py").write_text(SCORE)
    (folder / "my_words.py").write_text("WORDS = ('good', 'film')")
    (folder / "prompts.txt").write_text("\n".join(f"the {w} film was" for w in ("good", "bad", "long")))
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXTGEN_CACHE", str(folder / "cache"))
        train_("--reward", "my_reward.py:score")
    return folder


@pytest.fixture
def project(made_once, tmp_path, monkeypatch):
    """A copy of that folder, the current one; its code was never named there."""
    shutil.copytree(made_once, tmp_path / "mine")
    (tmp_path / "mine" / "it ran").unlink()
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def named(project):
    """The code of the project was named by this user, as it is now."""
    remember(["my_reward.py:score"])


def train_(*options, out="runs/a"):
    result = textgen(
        "train", "--model", "model", "--prompts", "prompts.txt", "--out", out, "--steps", 8, *SMALL, *options
    )
    assert result.exit_code == 0, result.output
    return config_of(out)


def config_of(run="runs/a"):
    return json.loads((Path(run) / "config.json").read_text())


@pytest.mark.slow
def test_a_function_in_a_file_is_the_reward_of_every_command(project, named):
    config = config_of()
    assert config["reward"] == "../../my_reward.py:score"
    digest = hashlib.sha256((project / "my_reward.py").read_bytes()).hexdigest()
    assert config["code"] == {"../../my_reward.py:score": digest}

    texts = json.loads(textgen("generate", "runs/a", "--prompt", "the film", "--json").stdout)
    expected = [sum(w in ("good", "film") for w in text["completion"].split()) for text in texts]
    assert [text["reward"] for text in texts] == expected
    by_name = {r["name"]: r["reward"] for r in json.loads(textgen("evaluate", "runs/a", "--json").stdout)["rows"]}
    stored = {r["name"]: r["reward"] for r in json.loads(Path("runs/a/summary.json").read_text())["report"]["rows"]}
    assert by_name == stored
    mix = '{"length": 1, "my_reward.py:score": 0.5}'
    sampled = textgen("generate", "--model", "model", "--reward", mix, "--prompt", "the film", "--json")
    assert sampled.exit_code == 0, sampled.output
    assert all(text["reward"] is not None for text in json.loads(sampled.stdout))


def test_a_class_is_made_once_and_its_instance_judges(project):
    Path("judges.py").write_text(
        "class Counts:\n    def __init__(self, letter='a'): self.letter = letter\n"
        "    def __call__(self, text): return text.count(self.letter)\n"
        "class Needs(Counts):\n    def __init__(self, letter): pass\n"
    )
    of_model = ("generate", "--model", "model", "--prompt", "the film", "--json", "--reward")
    texts = json.loads(textgen(*of_model, "judges.py:Counts").stdout)
    assert [text["reward"] for text in texts] == [text["completion"].count("a") for text in texts]
    refused = textgen(*of_model, "judges.py:Needs")
    assert refused.exit_code == 2
    assert "is a class, and is made without arguments" in refused.stderr


def test_what_raises_while_it_is_made_is_one_line(project):
    Path("judges.py").write_text(
        "class Lost:\n    def __init__(self): self.words = open('no words.txt').read()\n"
        "class Counts:\n    def __init__(self): self.size = len(5)\n"
        "def model(): raise OSError('no disk')\n"
    )
    for option, name, said in (
        ("--reward", "Lost", "raised FileNotFoundError: [Errno 2]"),
        ("--reward", "Counts", "raised TypeError: object of type 'int' has no len()"),
        ("--model", "model", "raised OSError: no disk"),
    ):
        others = () if option == "--model" else ("--model", "model")
        refused = textgen("generate", option, f"judges.py:{name}", *others, "--prompt", "the film")
        assert (refused.exit_code, refused.exception.__class__) == (2, SystemExit)
        assert f"'judges.py:{name}' {said}" in refused.stderr


def test_a_module_of_the_current_folder_goes_before_one_of_another_that_was_named(tmp_path, monkeypatch):
    for name, worth in (("first", 1.0), ("second", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"judges_of_{tmp_path.name}.py").write_text(f"def score(text): return {worth}")
    reference = f"judges_of_{tmp_path.name}:score"
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path / "first")
    remember([reference])
    assert identify(reference).file.parent.name == "first"
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.startswith(str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    assert identify(reference).file.parent.name == "first"  # nothing is here: where it was found before
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.startswith(str(tmp_path))])
    monkeypatch.chdir(tmp_path / "second")
    assert identify(reference).file.parent.name == "second"
    assert load_code(reference)("") == 2.0
    assert identify(reference).file == Path(sys.modules[reference.partition(":")[0]].__file__)


def _remember(folder, name, barrier):
    os.environ["TEXTGEN_CACHE"] = str(folder)
    barrier.wait()
    remember([f"{folder / name}:score"])


def test_code_that_several_processes_name_at_once_is_all_known(tmp_path):
    names = [f"judge_{number}.py" for number in range(4)]
    for name in names:
        (tmp_path / name).write_text("def score(text): return 1.0")
    barrier = CONTEXT.Barrier(len(names))
    processes = [CONTEXT.Process(target=_remember, args=(tmp_path, name, barrier)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    known = json.loads((tmp_path / KNOWN_CODE_FILE).read_text())
    assert sorted(Path(reference.rpartition(":")[0]).name for reference in known) == names


@pytest.mark.slow
def test_a_changed_function_takes_its_own_place_in_a_mix(project):
    Path("half.py").write_text("def score(text): return 0.5")
    train_("--reward", '[["length", 1], ["half.py:score", 2]]', out="runs/mix")
    Path("half.py").write_text("def score(text): return 0.25")
    texts = ("generate", "runs/mix", "--prompt", "the film", "--json", "--reward")
    answer = textgen(*texts, "half.py:score")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    lengths = make_reward("length")([Generation("the film", text["completion"]) for text in found])
    assert [text["reward"] for text in found] == pytest.approx(lengths + 2 * 0.25)


def test_a_run_with_its_own_reward_is_recorded(project, named):
    pytest.importorskip("minari", reason="recorded texts need minari[hdf5]")
    recorded = textgen("record", "runs/a", "--out", "data", "--episodes", 3)
    assert recorded.exit_code == 0, recorded.output


@pytest.mark.slow
def test_models_and_prompts_may_be_functions_too(project):
    config = train_("--model", "my_reward.py:model", "--prompts", "my_reward.py:prompts", out="runs/b")
    assert (config["model"], config["prompts"]) == ("../../my_reward.py:model", "../../my_reward.py:prompts")
    assert textgen("generate", "runs/b", "--prompt", "the film").exit_code == 0
    written = textgen("generate", "--model", "my_reward.py:model", "--prompt", "the film")
    assert written.exit_code == 0, written.output
    cut = ("--method", "layers", "--amount", 0.5, "--heal", 1, "--text", "prompts.txt")
    for model, out in (("model", "by_name"), ("my_reward.py:model", "by_code")):
        pruned = textgen("prune", model, *cut, "--out", out)
        assert pruned.exit_code == 0, pruned.output
    by_name, by_code = (load_file(Path(out) / "model.safetensors") for out in ("by_name", "by_code"))
    assert by_name.keys() == by_code.keys()
    assert all(torch.equal(weight, by_code[name]) for name, weight in by_name.items())
    refused = textgen("prune", "my_reward.py:prompts", "--out", "c")
    assert refused.exit_code == 2
    refused = textgen("train", "--model", "my_reward.py:model", "--prune", "l1_unstructured:0.1", "--out", "c")
    assert "prune needs a model by name" in refused.stderr


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_unchanged_function_and_names_a_changed_one(project):
    config = RunConfig(
        model="model", prompts="prompts.txt", reward="my_reward.py:score", steps=100, envs=4, eval_texts=8,
        eval_samples=4, checkpoint_every=8, env=SIZES,
    )  # fmt: skip
    script = (project / "my_reward.py").read_text()
    stop = "import itertools\nleft = itertools.count()\n"
    (project / "my_reward.py").write_text(
        stop + script.replace("    return", "    if next(left) == 32:\n        raise KeyboardInterrupt\n    return", 1)
    )
    assert not train(config, "runs/s").finished
    changed = (project / "my_reward.py").read_text()
    (project / "my_reward.py").write_text(script)
    with pytest.raises(ConfigError, match=r"my_reward\.py was changed since the run"):
        resume("runs/s")
    (project / "my_reward.py").write_text(changed)
    assert resume("runs/s").finished  # the same process: texts are counted on


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_a_changed_function_that_is_named_again(project):
    config = RunConfig(
        model="model", prompts="prompts.txt", reward={"length": 1, "my_reward.py:score": 1}, steps=100, envs=4,
        eval_texts=8, eval_samples=4, checkpoint_every=8, env=SIZES,
    )  # fmt: skip
    path, script = project / "my_reward.py", (project / "my_reward.py").read_text()
    stopping = "    if list(Path().glob('{}')):\n        raise KeyboardInterrupt\n    return"
    path.write_text(script.replace("    return", stopping.format("runs/s/checkpoints/0*"), 1))
    assert not train(config, "runs/s").finished
    path.write_text(script.replace("    return", stopping.format("stop"), 1))
    go_on = ("train", "--resume", "runs/s", "--reward")
    for options, said in (
        (go_on[:-1], "my_reward.py was changed since the run"),
        ((*go_on, "my_reward.py:prompts"), "resumed with its own functions"),
        ((*go_on, "json"), "resumed with its own reward"),
        ((*go_on, '{"length": 9, "my_reward.py:score": 1}'), "resumed with its own reward"),
    ):
        refused = textgen(*options)
        assert (refused.exit_code, said in refused.stderr) == (2, True), refused.output
    before = config_of("runs/s")

    Path("stop").touch()  # before there is another checkpoint
    assert textgen(*go_on, '{"length": 1, "my_reward.py:score": 1}').exit_code == 130
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert config_of("runs/s") == before | {"code": {"../../my_reward.py:score": digest}} != before
    Path("stop").unlink()
    finished = textgen(*go_on[:-1])  # it was accepted
    assert finished.exit_code == 0, finished.output
    assert "going on after" in finished.stdout


def test_a_function_whose_file_is_missing_is_said_to_be_missing(project, named):
    Path("my_reward.py").rename("judge.py")
    refused = textgen("evaluate", "runs/a")
    assert refused.exit_code == 2
    assert "my_reward.py:score, and there is no such file: put it there" in refused.stderr
    shutil.copytree("runs/a", "a/moved/run")
    refused = textgen("evaluate", "a/moved/run")
    assert "never named on this machine, and there is no such file: put it there" in refused.stderr
    assert "look at it" not in refused.stderr
    named_where_it_is = textgen("generate", "runs/a", "--prompt", "the film", "--reward", "judge.py:score")
    assert named_where_it_is.exit_code == 0, named_where_it_is.output


@pytest.mark.slow
def test_security_a_stranger_s_run_runs_no_code_unless_it_is_trusted(project):
    for command in (["evaluate", "runs/a"], ["train", "--config", "runs/a/config.json", "--out", "runs/b"]):
        refused = textgen(*command)
        assert refused.exit_code == 2
        assert "never named on this machine" in refused.stderr
        assert "--trust" in refused.stderr
    written = textgen("generate", "runs/a", "--prompt", "the film", "--json")
    assert written.exit_code == 0, written.output
    assert "not scored" in written.stderr
    assert {text["reward"] for text in json.loads(written.stdout)} == {None}
    assert not (project / "it ran").exists()
    assert not Path("runs/b").exists()

    assert textgen("evaluate", "runs/a", "--trust").exit_code == 0


@pytest.mark.parametrize("reference", ["os:system", "shutil:rmtree", "/usr/bin/evil.py:f", "evil:f", "json.tool:main"])
def test_security_a_configuration_cannot_name_modules_of_the_machine(project, reference, capfd):
    path = Path("runs/a/config.json")
    config = config_of() | {"reward": reference}
    Path("evil.py").write_text("raise SystemExit('it ran')")
    for code in ({}, {reference: "0" * 64}, {reference: ""}):
        path.write_text(json.dumps(config | {"code": code, "agent_sees_reward": False}))
        with pytest.raises(ConfigError, match="never named on this machine"):
            load_run("runs/a")
    assert textgen("generate", "runs/a", "--prompt", "the film").exit_code == 0  # without it


@pytest.mark.slow
def test_code_that_was_changed_after_it_was_named_is_not_the_code_that_was_named(project, named):
    script = project / "my_reward.py"
    original = script.read_text()
    script.write_text(original + "# changed\n")
    path = Path("runs/a/config.json")
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    config = config_of()
    path.write_text(json.dumps(config | {"code": dict.fromkeys(config["code"], digest)}))
    with pytest.raises(ConfigError, match="changed since it was last named"):
        load_run("runs/a")
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="changed since the run"):
        load_run("runs/a", trust=True)  # trusted, but not the same
    again = textgen("evaluate", "runs/a", "--reward", "my_reward.py:score")
    assert again.exit_code == 0, again.output
    script.write_text(original)
    assert load_run("runs/a").agent.num_timesteps == 8


@pytest.mark.slow
def test_a_run_of_a_python_function_writes_without_it_and_is_scored_with_it_again(project):
    config = RunConfig(model="model", prompts="prompts.txt", steps=8, envs=4, eval_texts=8, eval_samples=4, env=SIZES)
    train(config, "runs/b", reward=len)
    written = textgen("generate", "runs/b", "--prompt", "the film")
    assert written.exit_code == 0, written.output
    assert written.stdout.startswith("unjudged")
    Path("again.py").write_text("def f(completion):\n    return 7\n")
    assert "+7.000" in textgen("generate", "runs/b", "--prompt", "the film", "--reward", "again.py:f").stdout
    assert "--reward FILE.py:NAME" in textgen("evaluate", "runs/b").stderr


@pytest.mark.slow
def test_an_agent_that_sees_the_running_score_does_not_write_without_it(project, own_cache):
    Path("running.py").write_text(
        "from textgen_env.rewards import Keywords\n\n\nclass Good(Keywords):\n    def __init__(self):\n"
        "        super().__init__(words=['good'])\n"
    )
    config = train_("--reward", "running.py:Good", out="runs/b")
    assert config["agent_sees_reward"]
    (own_cache / KNOWN_CODE_FILE).unlink()
    refused = textgen("generate", "runs/b", "--prompt", "the film")
    assert refused.exit_code == 2
    assert "never named" in refused.stderr


def test_what_is_wrong_with_a_reference_is_said(project):
    Path("broken.py").write_text("def f(:")
    Path("raises.py").write_text("1 / 0")
    for reference, message in {
        "nowhere.py:f": "no file at 'nowhere.py'",
        "broken.py:f": "SyntaxError",
        "raises.py:f": "ZeroDivisionError: division by zero",
        "my_reward.py:scor": "Did you mean 'score'",
        "no_such_module:f": "names no module",
        "my_words:WORDS": "no reward",
    }.items():
        result = textgen("train", "--model", "model", "--reward", reference, "--out", "runs/x", *SMALL)
        assert result.exit_code == 2, result.output
        assert message in result.stderr, result.stderr
    assert not Path("runs/x").exists()


def test_a_start_that_fails_leaves_no_folder(project):
    Path("bad.py").write_text("def f(completion):\n    return 'good'\n")
    with pytest.raises(RewardError, match="not numbers"):
        train(RunConfig(reward="bad.py:f"), "new/deep/x")
    assert not Path("new").exists()
    Path("empty").mkdir()
    with pytest.raises(RewardError):
        train(RunConfig(reward="bad.py:f"), "empty")
    assert not list(Path("empty").iterdir())


# --- references


def test_references_are_found_in_every_form_of_a_reward_and_nowhere_else():
    found = []
    replace_references("a.py:f", found.append)
    replace_references({"a.b:g": 1.0, "sentiment": 2.0}, found.append)
    replace_references([["length", 1], ["h.py:h", 2]], found.append)
    replace_references({"name": "shaped", "reward": "i.py:i", "potential": "keywords"}, found.append)
    replace_references({"name": "keywords", "words": ["no:word"]}, found.append)
    assert found == ["a.py:f", "a.b:g", "h.py:h", "i.py:i"]
    assert not any(map(is_reference, ("openings", "a:b c", "TextGen/Needle-v0:depth=6", "", ":", "a:", ":b", 3)))


def test_a_file_is_run_once_until_it_changes(tmp_path):
    (tmp_path / "f.py").write_text("x = object()")
    reference = f"{tmp_path / 'f.py'}:x"
    first = load_code(reference)
    assert load_code(reference) is first
    (tmp_path / "f.py").write_text("x = object()  # changed")
    assert load_code(reference) is not first


# --- runs and configurations that move


@pytest.mark.slow
def test_a_run_moves_with_its_project_and_keeps_its_prompts(project, tmp_path):
    config = config_of()
    assert (config["model"], config["prompts"]) == ("../../model", "prompts.jsonl")
    before = textgen("evaluate", "runs/a", "--json", "--trust").stdout
    (project / "prompts.txt").unlink()
    shutil.move(project, tmp_path / "elsewhere")
    os.chdir(tmp_path)
    after = textgen("evaluate", "elsewhere/runs/a", "--json", "--trust")
    assert after.exit_code == 0, after.output
    assert after.stdout == before


@pytest.mark.parametrize("here", [".", "sub"])
def test_paths_come_back_from_a_folder_as_they_were(project, monkeypatch, here):
    (project / "sub").mkdir()
    (project / "sub" / "words.json").write_text("{}")
    config = RunConfig(
        model="model",
        prompts={"dataset": "sub"},
        reward=[[{"name": "classifier", "file": "sub/words.json"}, 1.0], ["my_reward.py:score", 2.0], ["length", 1.0]],
        code={"my_reward.py:score": "0"},
    )
    stored = portable(config, Path(here) / "run")
    assert stored.model == os.path.relpath("model", Path(here) / "run")
    assert located(stored, Path(here) / "run") == config
    absolute = RunConfig(model=str(project / "model"), prompts="prompts.txt:train", reward="sentiment")
    assert portable(absolute, Path("run")).model == str(project / "model")
    assert portable(absolute, Path("run")).prompts == "../prompts.txt:train"


def test_prompts_are_kept_only_where_they_come_back_the_same(tmp_path):
    rows = [{"prompt": "a\n", "reference": "b", "topic": "x", "n": 3}, {"prompt": "ü", "template": "t"}]
    kept = kept_prompts(rows)
    (tmp_path / "kept.jsonl").write_text(kept)
    assert list(make_prompts(str(tmp_path / "kept.jsonl"))) == list(make_prompts(rows))
    for spec in ("openings", "food", "food:train", None, lambda rng: "a", "my.py:f", [{"prompt": "a", "x": (1, 2)}]):
        assert kept_prompts(spec) is None


# --- YAML


def test_texts_of_another_length_are_full_unless_the_file_says_otherwise(tmp_path):
    for written, expected in (
        ("{max_new_tokens: 8}", (8, 8)),
        ("{max_new_tokens: 40}", (40, 40)),
        ("{max_new_tokens: 8, min_new_tokens: 3}", (3, 8)),
        ("{top_k: 4}", (20, 20)),
    ):
        (tmp_path / "a.yaml").write_text(f"env: {written}")
        env = read_config(tmp_path / "a.yaml").env
        assert (env["min_new_tokens"], env["max_new_tokens"]) == expected
    (tmp_path / "a.yaml").write_text("{env: {max_new_tokens: 8}, partner: {name: script, lines: ['Why?']}}")
    assert read_config(tmp_path / "a.yaml").env["min_new_tokens"] == 0


def test_a_yaml_configuration_is_the_same_as_json(project):
    (project / "sub").mkdir()
    Path("sub/a.yaml").write_text(
        "# a comment\nmodel: ../model\nreward: {name: keywords, words: [no, yes]}\nbeta: 1e-2\nsteps: 100\n"
        "prune: null\nenv:\n  top_k: 4\n  min_new_tokens: 0\n"
    )
    config = RunConfig(
        model="model", reward={"name": "keywords", "words": ["no", "yes"]}, beta=0.01, steps=100,
        env={"top_k": 4, "min_new_tokens": 0},
    )  # fmt: skip
    assert read_config(Path("sub/a.yaml")) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "must be YAML"),
        ("- a", r"must be a mapping \(in JSON an object\), got list"),
        ("1: 2", "unknown field '1'"),
        ("stepps: 1", "Did you mean 'steps'"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("steps: !!python/object/apply:os.system ['true']", "must be YAML"),
        ("steps: !!timestamp 2020-01-01", "must be YAML"),
        ("reward: " + "[" * 200 + "]" * 200, "nested too deep"),
        ("seed: 2020-01-01", "seed must be a whole number"),
    ],
)
def test_security_yaml_that_is_no_configuration_is_refused(tmp_path, text, message):
    (tmp_path / "a.yml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "a.yml")
