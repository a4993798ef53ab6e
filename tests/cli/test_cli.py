"""The command line, on a tiny model in a folder."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from agents.cli.app import app
from agents.cli.train import INTERRUPTED, WHERE
from agents.runs.config import RunConfig
from agents.zoo import OBSERVATION
from textgen_env.models import MODEL_NAMES
from textgen_env.openings import OPENINGS
from textgen_env.rewards import REWARDS

TINY = ["--max-prompt-tokens", "8", "--max-new-tokens", "4", "--top-k", "4", "--texts", "8", "--samples", "4"]


def textgen(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


@pytest.fixture(scope="module", autouse=True)
def _cache_of_its_own(tmp_path_factory):
    """Yardsticks of these runs stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr("agents.runs.yardsticks.cache_folder", lambda: cache)
        yield


@pytest.fixture(scope="module")
def folder(tiny_lm, tmp_path_factory):
    """The tiny model, its prompts, and a run on them."""
    folder = tmp_path_factory.mktemp("cli")
    for part in tiny_lm:
        part.save_pretrained(folder / "model")
    words = ["film", "long film", "good film", "bad film"]
    (folder / "prompts.txt").write_text("\n".join(f"the {w} was" for w in words))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    result = textgen(
        *("train", "--out", folder / "run", "--model", folder / "model", "--prompts", folder / "prompts.txt"),
        *("--prune", "l1_unstructured:0.1", "--steps", 400, "--envs", 4, *TINY),
    )
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.slow
def test_train_shows_the_table_and_where_everything_is(run, folder):
    for words in ("language model, sampled", "score lookahead", "text_dqn, trained", "best possible policy"):
        assert words in run.stdout
    assert "l1_unstructured 10%" in run.stdout
    assert "too few to hold some back" in run.stdout.replace("\n", " ")
    config = json.loads((folder / "run" / "config.json").read_text())
    given = {"top_k": 4, "max_new_tokens": 4, "max_prompt_tokens": 8, "min_new_tokens": 4}
    assert config["env"] == {**given, "observation": "full"}
    assert config["model"] == str(folder / "model")


@pytest.mark.slow
def test_generate_prints_a_json_list(run, folder):
    result = textgen("generate", folder / "run", "--prompt", "the film", "--num", 3, "--json")
    assert result.exit_code == 0, result.output
    texts = json.loads(result.stdout)
    assert [set(text) for text in texts] == [{"prompt", "completion", "reward", "logprob"}] * 3
    assert all(text["prompt"] == "the film" and -1 <= text["reward"] <= 1 and text["logprob"] < 0 for text in texts)
    assert json.loads(textgen("generate", folder / "run", "--prompt", "the film", "--num", 3, "--json").stdout) == texts


def test_generate_without_json_prints_a_line_a_text(run, folder):
    result = textgen("generate", folder / "run", "--prompt", "the film", "--num", 2, "--greedy", "--beta", 0.05)
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]  # greedy
    assert "the film|" in lines[0]


@pytest.mark.slow
def test_generate_draws_each_text_from_weighted_ones(run, folder):
    command = ("generate", folder / "run", "--prompt", "the film", "--num", 3, "--particles", 5)
    result = textgen(*command, "--json")
    assert result.exit_code == 0, result.output
    texts = json.loads(result.stdout)
    assert len(texts) == 3
    for text in texts:
        assert len(text["particles"]) == 5
        assert sum(particle["weight"] for particle in text["particles"]) == pytest.approx(1)
        assert (text["completion"], text["reward"]) in [(p["completion"], p["reward"]) for p in text["particles"]]
        assert text["tokens"] == 5 * 4
        assert text["logprob"] < 0
    value = sum(text["value_at_least"] for text in texts) / 3
    shown = textgen(*command)
    assert "Each picked from 5 by weight, at 20 tokens" in shown.stderr
    assert f"at least J = {value:.3f}" in shown.stderr
    unjudged = textgen(*command, "--no-judge")
    assert unjudged.stdout.count("unjudged  the film|") == 3
    assert "the last weight is left out" in unjudged.stderr
    of_model = ("generate", "--model", folder / "model", "--max-new-tokens", 3, "--particles", 4, "--beta", 0.05)
    assert "Each picked from 4 by weight, at 12 tokens" in textgen(*of_model, "--prompt", "the film").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--particles", "2", "--greedy"], "leave one out"),
        (["--no-judge"], "a setting of --particles"),
        (["--particles", "100000000000"], "use fewer rows"),
    ],
)
def test_generate_says_which_particles_it_cannot_draw(arguments, message, run, folder):
    result = textgen("generate", folder / "run", "--prompt", "the film", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")


@pytest.mark.slow
def test_record_writes_a_dataset_of_a_run_or_of_a_language_model(run, folder, monkeypatch):
    pytest.importorskip("minari", reason="recorded texts need minari[hdf5]")
    from agents.text_dqn.offline import BEHAVIOUR, open_dataset

    of_model = ("--model", folder / "model", "--reward", "length", "--max-new-tokens", 3, "--top-k", 4)
    for name, options in {
        "agent-v0": (folder / "run",),
        "model-v0": (*of_model, "--prompts", folder / "prompts.txt"),
    }.items():
        result = textgen("record", *options, "--out", folder / name, "--episodes", 6)
        assert result.exit_code == 0, result.output
        dataset = open_dataset(folder / name)
        assert f"6 texts of {dataset.total_steps} tokens" in result.stdout
        assert all((episode.infos[BEHAVIOUR][1:] < 0).all() for episode in dataset)
        assert all(episode.observations["action_mask"].any(-1).all() for episode in dataset)
    monkeypatch.chdir(folder)  # a relative folder, too
    result = textgen("record", *options, "--out", "relative-v0", "--episodes", 2)
    assert result.exit_code == 0, result.output
    assert open_dataset("relative-v0").total_episodes == 2
    env = dataset.recover_environment()
    assert env.observation_space == dataset.observation_space
    observation, _ = env.reset(options={"prompt": "the film was"})
    assert env.observation_space.contains(observation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either the folder of a run"),
        (["RUN", "--top-k", "4"], "leave them out"),
        (["RUN"], "not an empty folder"),
        (["--model", "MODEL", "--top-k", "4", "--reward", "nothing"], "unknown reward 'nothing'"),
    ],
)
def test_record_says_what_is_wrong(arguments, message, run, folder):
    (folder / "full").mkdir(exist_ok=True)
    (folder / "full" / "note.txt").write_text("mine")
    places = {"RUN": folder / "run", "MODEL": folder / "model"}
    result = textgen("record", *(places.get(a, a) for a in arguments), "--out", folder / "full")
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")


def test_generate_samples_a_language_model_itself(folder):
    result = textgen(
        *("generate", "--model", folder / "model", "--prompt", "the film", "--max-new-tokens", 3, "--json"),
        *("--reward", '{"name": "keywords", "words": ["good"]}'),
    )
    texts = json.loads(result.stdout)
    assert len(texts) == 4
    assert all(text["reward"] == ("good" in text["completion"]) for text in texts)


def test_generate_begins_with_each_prompt_once_and_takes_the_candidates_that_it_is_told(folder):
    prompts = ["the film", "a dog", "the cat", "the film was", "the dog"]
    options = [option for prompt in prompts for option in ("--prompt", prompt)]
    of_model = ("generate", "--model", folder / "model", "--max-new-tokens", 3, "--json")
    texts = json.loads(textgen(*of_model, *options, "--top-k", 1, "--dtype", "float32").stdout)
    assert [text["prompt"] for text in texts] == prompts
    likeliest = json.loads(textgen(*of_model, *options, "--greedy").stdout)
    assert [text["completion"] for text in texts] == [text["completion"] for text in likeliest]
    assert len(json.loads(textgen(*of_model, *options, "--num", 2).stdout)) == 2


def test_a_pruned_and_healed_model_writes(folder, tmp_path):
    result = textgen(
        *("prune", folder / "model", "--cuts", "layers:0.5+ffn:0.25", "--heal", 2),
        *("--text", folder / "prompts.txt", "--out", tmp_path / "p"),
    )
    assert result.exit_code == 0, result.output
    assert "layers 50% + ffn 25%" in result.output
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (1, 18)

    written = textgen("generate", "--model", tmp_path / "p", "--prompt", "the film", "--max-new-tokens", 4, "--num", 2)
    assert written.exit_code == 0, written.output
    assert written.output.count("the film|") == 2


@pytest.mark.slow
def test_evaluate_measures_what_more_tokens_buy(run, folder):
    result = textgen("evaluate", folder / "run", "--particles", "1, 2", "--out", folder / "tokens")
    assert result.exit_code == 0, result.output
    assert "more tokens a text" in result.stdout
    points = json.loads((folder / "tokens" / "summary.json").read_text())["spending"]
    assert [(point["way"], point["n"]) for point in points if point["tokens"] == 8] == [
        (way, 2) for way in ("best of n", "weighted best of n", "guided best of n", "particles")
    ]
    assert (folder / "tokens" / "tokens.png").is_file()
    refused = textgen("evaluate", folder / "run", "--particles", "2,none")
    assert refused.exit_code == 2
    assert "like 1,2,4,8, got '2,none'" in refused.stderr


@pytest.mark.slow
def test_evaluate_repeats_the_table_and_draws_the_plane(run, folder):
    result = textgen("evaluate", folder / "run")
    assert result.exit_code == 0, result.output
    trained = [line for line in run.stdout.splitlines() if "text_dqn, trained" in line]
    assert trained
    assert [line for line in result.stdout.splitlines() if "text_dqn, trained" in line] == trained
    assert (folder / "run" / "evaluation" / "plane.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_evaluate_on_other_prompts_as_json(run, folder):
    (folder / "one.txt").write_text("good film")
    result = textgen(
        *("evaluate", folder / "run", "--prompts", folder / "one.txt", "--texts", 6, "--samples", 5),
        *("--out", folder / "figures", "--json"),
    )
    report = json.loads(result.stdout)
    assert report == json.loads((folder / "figures" / "summary.json").read_text())
    by_name = {row["name"]: row["details"] for row in report["rows"] if row["details"]}
    assert (by_name["text_dqn, trained"]["texts"], by_name["text_dqn, trained"]["prompts"]) == (6, 1)
    assert by_name["language model, sampled"]["texts"] == 6
    rewards = {row["name"]: row["reward"] for row in report["rows"]}
    assert report["metrics"]["text_dqn, trained"]["reward_mean"] == pytest.approx(rewards["text_dqn, trained"])
    assert 0 < report["metrics"]["language model"]["distinct_1"] <= 1


@pytest.mark.slow
def test_a_stored_configuration_is_a_start_for_another_run(run, folder):
    result = textgen(
        *("train", "--config", folder / "run" / "config.json", "--out", folder / "other", "--prune", "none"),
        *("--steps", 40, "--no-candidate-scores", "--reward", "length"),
    )
    assert result.exit_code == 0, result.output
    first, second = (json.loads((folder / name / "config.json").read_text()) for name in ("run", "other"))
    assert (first["env"].pop("observation"), second["env"].pop("observation")) == ("full", [*OBSERVATION])
    assert second == {**first, "prune": None, "steps": 40, "reward": "length"}


@pytest.mark.slow
@pytest.mark.parametrize(("fewest", "expected"), [(0, 0), (4, 5)])
def test_a_longer_text_keeps_the_file_s_least_length_unless_all_texts_are_full(run, folder, fewest, expected):
    stored = json.loads((folder / "run" / "config.json").read_text())
    stored["env"]["min_new_tokens"], start = fewest, folder / "run" / "start.json"
    start.write_text(json.dumps(stored))
    out = folder / f"longer-{fewest}"
    result = textgen("train", "--config", start, "--max-new-tokens", 5, "--steps", 8, "--out", out)
    assert result.exit_code == 0, result.output
    env = json.loads((out / "config.json").read_text())["env"]
    assert (env["min_new_tokens"], env["max_new_tokens"]) == (expected, 5)


@pytest.mark.slow
def test_evaluations_keep_what_was_tempered_and_refuse_before_they_measure(run, folder):
    command = ("evaluate", folder / "run", "--texts", 6, "--samples", 4)
    assert textgen(*command, "--particles", "2").exit_code == 0
    tempered = folder / "run" / "evaluation" / "particles-2.json"
    chosen = tempered.read_text()
    assert textgen(*command).exit_code == 0
    assert tempered.read_text() == chosen
    summary = (folder / "run" / "evaluation" / "summary.json").read_text()
    for options, said in (
        (("--particles", "2,64"), "particles must be at most 4, the samples of a prompt, got 64"),
        (("--out", folder / "prompts.txt"), "is a file: give --out a folder"),
    ):
        result = textgen(*command, *options)
        assert (result.exit_code, said in result.stderr) == (2, True), result.output
    assert (folder / "run" / "evaluation" / "summary.json").read_text() == summary


def test_texts_that_nobody_judges_are_drawn_by_weight_whatever_was_tempered(run, folder, monkeypatch):
    from agents.baselines.particles import ParticlesAgent

    drawn, init = [], ParticlesAgent.__init__
    monkeypatch.setattr(ParticlesAgent, "__init__", lambda *a, **kw: (drawn.append(kw), init(*a, **kw))[1])
    monkeypatch.setattr(
        "agents.runs.spending.tempered_settings", lambda folder, n: {"pick": "best", "trust": 0.5, "threshold": 0.5}
    )
    for options in ([], ["--no-judge"]):
        assert textgen("generate", folder / "run", "--prompt", "the film", "--particles", 2, *options).exit_code == 0
    assert [(kw["pick"], kw["trust"]) for kw in drawn] == [("best", 0.5), ("weight", 0.5)]


@pytest.mark.slow
def test_each_prompt_of_a_task_is_begun_with_in_its_turn(tmp_path):
    sizes = ("--steps", 64, "--texts", 2, "--samples", 2)
    made = textgen("train", "--task", "StarGraph", "--out", tmp_path / "run", *sizes)
    assert made.exit_code == 0, made.output
    prompts = ("--prompt", "e:", "--prompt", "a:", "--prompt", "e:")
    texts = json.loads(textgen("generate", tmp_path / "run", *prompts, "--num", 3, "--json").stdout)
    assert [text["prompt"] for text in texts] == ["e:", "a:", "e:"]
    unknown = textgen("generate", tmp_path / "run", "--prompt", "a:", "--prompt", "a:a1", "--num", 2)
    assert (unknown.exit_code, "the prompt 'a:a1' has" in unknown.stderr) == (2, True)


@pytest.mark.slow
def test_a_configuration_of_another_agent_has_the_usual_observation_of_this_one(run, folder):
    result = textgen(
        *("train", "--config", folder / "run" / "config.json", "--agent", "dqn", "--out", folder / "dqn"),
        *("--prune", "none", "--steps", 64),
    )
    assert result.exit_code == 0, result.output
    plain = RunConfig(agent="dqn", env={}).env["observation"]
    assert json.loads((folder / "dqn" / "config.json").read_text())["env"]["observation"] == plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model", "smollm"], "Did you mean 'smollm2'"),
        (["train", "--agent", "textdqn"], "Did you mean 'text_dqn'"),
        (["train", "--reward", "my.py"], "say which function of it, --reward my.py:NAME"),
        (["train", "--reward", "sentimet", "--model", "{model}"], "Did you mean 'sentiment'"),
        (["train", "--reward", '{"sentiment": }', "--model", "{model}"], "looks like JSON but is none"),
        (["train", "--prune", "l1:0.1"], "unknown pruning method 'l1'"),
        (["prune", "{model}", "--out", "p", "--method", "fnn"], "Did you mean 'ffn'"),
        (["prune", "{model}", "--out", "p", "--amount", "1"], "must be in [0, 1)"),
        (["prune", "{model}", "--out", "p", "--cuts", "layers"], "METHOD:AMOUNT"),
        (["prune", "{model}", "--out", "p", "--text", "nowhere.txt"], "cannot read 'nowhere.txt'"),
        (["prune", "{model}", "--out", "{model}"], "holds a model already"),
        (["train", "--prompts", "nowhere.txt", "--model", "{model}"], "no file of prompts at 'nowhere.txt'"),
        (["train", "--resume", "{run}", "--steps", "3", "--candidate-scores"], "leave out --candidate-scores, --steps"),
        (["train", "--resume", "{run}", "--engine", "local"], "a finished run"),
        (["train", "--config", "nowhere.json"], "cannot read 'nowhere.json'"),
        (["train", "--minutes", "0"], "--minutes must be above 0"),
        (["train", "--minutes", "3", "--steps", "9", "--texts", "9"], "--minutes chooses --steps, --texts"),
        (["train", "--minutes", "3", "--engine", "ray"], "--minutes times this machine alone"),
        (["train", "--resume", "{run}", "--minutes", "3"], "leave out --minutes"),
        (["train", "--max-new-tokens", "4", "--min-new-tokens", "5"], "min_new_tokens must be at most"),
        (["train", "--model", "{model}", "--top-k", "4", "--max-prompt-tokens", "200"], "exceed the 128 tokens"),
        (["generate"], "give either the folder of a run, or --model"),
        (["generate", "nowhere"], "holds no config.json"),
        (["generate", "--model", "{model}", "--prompt", " "], "must not be empty"),
        (["generate", "--model", "{model}", "--beta", "0.1"], "the language model itself has none"),
        (["generate", "{run}", "--reward", "length"], "leave it out"),
        (["generate", "{run}", "--dtype", "float16", "--top-k", "3"], "--dtype, --top-k: a run has its own"),
        (["generate", "--model", "{model}", "--dtype", "float31"], "dtype must be one of 'auto', 'float32'"),
        (["train", "--model", "{model}", "--dtype", "float31"], "dtype must be one of 'auto', 'float32'"),
        (["generate", "{run}", "--prompt", "the " * 9], "more than max_prompt_tokens=8"),
        (["evaluate", "{run}", "--prompts", "fod"], "prompts in the box"),
        (["list", "reward"], "Did you mean 'rewards'"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(arguments, message, run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"{model}": folder / "model", "{run}": folder / "run"}
    result = textgen(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_existing_run_is_not_overwritten(run, folder):
    result = textgen("train", "--out", folder / "run", "--model", folder / "model")
    assert result.exit_code == 2
    assert "already holds a run" in result.stderr


def test_ctrl_c_ends_with_130_and_says_where(folder, monkeypatch):
    from agents.runs.run import Run

    def interrupt(self, say):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "yardstick", interrupt)
    result = textgen("train", "--out", folder / "stopped", "--model", folder / "model", "--steps", 40, *TINY)
    assert result.exit_code == INTERRUPTED == 130
    assert str(folder / "stopped") in result.stdout.replace("\n", "")


def test_list_names_everything_there_is():
    shown = textgen("list").stdout
    for name in (*REWARDS, *OPENINGS, "text_dqn", "lookahead", *MODEL_NAMES, "wanda"):
        assert name in shown
    assert "wanda" not in textgen("list", "rewards").stdout


OF_NO_FIELD = ("out", "min_new_tokens", "candidate_scores", "score", *WHERE)
"""Options whose default is no single value of a run's configuration."""


def test_the_help_shows_the_defaults_of_a_run():
    from agents.runs.config import CONVERSATION_SETTINGS, ENV_SETTINGS, RunConfig
    from textgen_env.config import EnvConfig

    config = RunConfig()
    names = {"texts": "eval_texts", "samples": "eval_samples"}
    shown = 0
    for option in typer.main.get_command(app).commands["train"].params:
        field = names.get(option.name, option.name)
        env = ENV_SETTINGS.get(field, getattr(EnvConfig(), field, None))
        if isinstance(option.show_default, str) and field not in OF_NO_FIELD:
            default = getattr(config, field, env)
            in_turns = CONVERSATION_SETTINGS.get(field, default)
            if "--partner" in (option.help or "") and field.startswith("max_"):
                default = in_turns
            elif in_turns != default:
                default = f"{default}; {in_turns} with --partner"
            assert option.show_default == ("none" if default is None else str(default)), field
            shown += 1
    assert shown >= 10


@pytest.mark.slow
def test_help_loads_no_framework():
    program = (
        "import sys; from typer.testing import CliRunner; from agents.cli.app import app\n"
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0\n"
        "print(*sys.modules.keys() & {'torch', 'transformers', 'matplotlib', 'stable_baselines3'})"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.slow
def test_train_and_benchmark_print_json_alone(folder, tmp_path):
    result = textgen(
        *("train", "--out", tmp_path / "r", "--model", folder / "model", "--prompts", folder / "prompts.txt"),
        *("--steps", 8, "--envs", 4, "--json", *TINY),
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed.pop("folder") == str(tmp_path / "r")
    assert printed == json.loads((tmp_path / "r" / "summary.json").read_text())
    common = ("--out", tmp_path / "b", "--json")
    sizes = ("--tasks", "Needle:depth=2", "--agents", "random,greedy", "--seeds", 2, "--workers", 1)
    figures = json.loads(textgen("benchmark", *sizes, *common).stdout)
    assert (figures["runs"], figures["failed"]) == (4, 0)
    scores = figures["scores"]["greedy"]["TextGen/Needle-v0:depth=2"]
    assert len(scores) == 2
    compared = json.loads(textgen("benchmark", "--compare", "random", "greedy", *common).stdout)
    assert compared["random against greedy"]["by_task"][0]["second"] == pytest.approx(sum(scores) / 2)


@pytest.mark.slow
def test_the_version_and_short_help_are_options_of_the_command():
    from importlib import metadata

    assert textgen("--version").stdout == f"textgen-env {metadata.version('textgen-env')}\n"
    for command in typer.main.get_command(app).commands:
        shown = textgen(command, "-h").stdout
        assert f"Example: textgen {command}" in shown
    assert all(panel in textgen("train", "-h").stdout for panel in ("Learning", "Texts and reward"))


@pytest.mark.slow
@pytest.mark.parametrize("width", [40, 60, 80, 90, 99, 100, 120])
def test_no_help_is_cut_at_any_width(width):
    from agents.cli.app import EXAMPLES

    commands = typer.main.get_command(app).commands
    for name in ("", *commands):
        shown = CliRunner().invoke(app, [*name.split(), "-h"], env={"COLUMNS": str(width)}).stdout
        assert "…" not in shown
        assert "..." not in shown.replace("[ARGS]...", "").replace("+...", "").replace("N,N,...", "")
        words = shown.replace("│", " ").replace(",", " ").split()
        options = [option for option in commands[name].params if "--" in option.opts[0]] if name else []
        assert {opt for option in options for opt in (*option.opts, *option.secondary_opts)} <= {*words}
        assert name or {*commands} <= {*words}
        too_long = [line for line in shown.splitlines() if len(line) > width and " " in line.strip()]
        assert all(f"Example: {EXAMPLES[name]}" == line for line in too_long)  # a command to copy is one line


@pytest.mark.parametrize("width", [40, 80])
def test_no_name_of_a_list_is_cut(width):
    shown = CliRunner().invoke(app, ["list", "pruning"], env={"COLUMNS": str(width)}).stdout
    assert "global_unstructured" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width


def test_every_example_of_a_help_is_parsed():
    import shlex

    from agents.cli.app import EXAMPLES

    group = typer.main.get_command(app)
    assert set(EXAMPLES) == set(group.commands)
    for name, example in EXAMPLES.items():
        words = shlex.split(example)
        assert words[:2] == ["textgen", name]
        group.commands[name].make_context(name, words[2:])


@pytest.mark.slow
def test_how_scores_are_found_is_a_setting_of_the_agent(folder, tmp_path):
    small = ("--model", folder / "model", "--prompts", folder / "prompts.txt", "--max-prompt-tokens", 8, "--top-k", 4)
    sizes = ("--max-new-tokens", 4, "--steps", 64, "--envs", 4, "--texts", 8, "--samples", 4)
    for score, stored in {"judge": "judge", "none": None}.items():
        result = textgen("train", *small, *sizes, "--reward", "length", "--score", score, "--out", tmp_path / score)
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / score / "config.json").read_text())["agent_settings"] == {"score": stored}
    refused = textgen("train", *small, *sizes, "--score", "judg", "--out", tmp_path / "x")
    assert (refused.exit_code, (tmp_path / "x").exists()) == (2, False)
    assert "score must be one of" in refused.stderr
