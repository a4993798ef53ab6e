"""The harness: same rows for the same command, nothing recorded is lost, and pages that hold what they should."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forked import CONTEXT, Forked, textgen
from typer.testing import CliRunner

from agents.benchmark.cells import CellResult, _open, check_agents, run_cell
from agents.benchmark.config import QUICK, BenchmarkConfig, Cell, task_ids
from agents.benchmark.grid import read_cells, run_benchmark
from agents.benchmark.pages import command_of, overall_table, write_report
from agents.benchmark.results import RESULT_COLUMNS, compare_results, read_results, scores_by_agent, write_results
from agents.cli.app import app
from textgen_env.errors import ConfigError, ContractError, RunFolderError, UnknownName
from textgen_env.tasks import make_task

CONFIG = BenchmarkConfig(
    tasks=("Needle:depth=3", "NoisyBandit"),
    agents=("sample", "best_of_n", "text_dqn", "my_agents:Raises", "my_agents:Illegal"),
    seeds=(0, 1),
    steps=200,
    envs=4,
    evaluations=3,
    texts=8,
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.parametrize(
    "changes",
    [{}, {"seeds": (7,)}, {"seeds": (0,)}, {"seeds": (0, 1, 2)}, {"evaluations": 9}, QUICK, {"seeds": (3, 1)}],
    ids=repr,
)
def test_the_command_in_a_report_runs_that_benchmark(changes, monkeypatch):
    config = BenchmarkConfig(**{"tasks": ("Needle:depth=3",), "agents": ("sample",), "evaluations": 4, **changes})
    ran = []
    monkeypatch.setattr("agents.cli.benchmark._run", lambda *arguments: ran.append(arguments[:2]))
    program, *words = shlex.split(command_of(config, Path("a folder")))
    assert (program, CliRunner().invoke(app, words).exit_code) == ("textgen", 0)
    assert ran == [(config, Path("a folder"))]


def in_this_process(config, cells, workers, started):
    """Another way to run cells than in processes."""
    yield from (run_cell(config, cell) for cell in cells)


def read(folder):
    """The rows of a benchmark, without their times."""
    with (folder / "results.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished benchmark with its report: the folder."""
    folder = tmp_path_factory.mktemp("benchmark") / "b"
    results = run_benchmark(CONFIG, folder, workers=2)
    write_report(folder, CONFIG, results)
    return folder


@pytest.mark.slow
def test_one_row_for_each_run_and_evaluation(done):
    rows = read(done)
    steps = [row["step"] for row in rows if row["agent"] == "text_dqn" and row["seed"] == "0"]
    assert steps == ["0", "100", "200"] * 2
    assert len([row for row in rows if row["agent"] == "sample"]) == 4
    assert set(rows[0]) == set(RESULT_COLUMNS) - {"seconds"}
    best_of_n = [row for row in rows if row["agent"] == "best_of_n" and row["task"].startswith("TextGen/Needle")]
    assert [float(row["tokens"]) for row in best_of_n] == [16 * 3] * 2  # 16 texts of 3 tokens for each
    assert [float(row["judge_calls"]) for row in best_of_n] == [16] * 2
    learners = [row for row in rows if row["agent"] == "text_dqn" and row["task"].startswith("TextGen/Needle")]
    texts = [0, 4 * (25 // 3), 4 * (50 // 3)]  # of 4 rows after 0, 25 and 50 steps
    assert [(int(row["learning_judge_calls"]), float(row["judge_calls"])) for row in learners] == [
        (n, 0) for n in texts
    ] * 2


def test_an_agent_with_settings_is_that_agent_with_those_settings():
    result = run_cell(CONFIG, Cell("TextGen/Needle-v0:depth=3", "best_of_n:n=2", 0))
    assert (result.status, result.rows[-1]["tokens"], result.rows[-1]["judge_calls"]) == ("ok", 2 * 3, 2)


def test_settings_that_an_agent_does_not_have_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"^agent 'best_of_n' refuses its settings: .*'m'; it takes n$"):
        run_benchmark(replace(CONFIG, agents=("best_of_n:m=2",)), tmp_path / "b")
    with pytest.raises(ConfigError, match=r"^n must be a whole number of at least 1, got 0"):
        run_benchmark(replace(CONFIG, agents=("best_of_n:n=0",)), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_the_price_of_kl_is_a_share_of_what_can_be_gained():
    agent, *_ = _open(CONFIG, Cell("TextGen/Sentiment-v0", "text_dqn", 0))
    bounds = make_task("TextGen/Sentiment-v0").bounds()
    assert agent.beta == agent.target_beta == pytest.approx(0.05 * (bounds.best - bounds.language_model))


@pytest.mark.slow
def test_the_same_command_gives_the_same_rows(done, tmp_path):
    run_benchmark(CONFIG, tmp_path / "again", cell_runner=in_this_process)
    assert read(tmp_path / "again") == read(done)


@pytest.mark.slow
@pytest.mark.parametrize("task", task_ids("diagnostic"))
def test_the_best_policy_scores_1_and_the_language_model_0(task):
    config = replace(CONFIG, tasks=(task,), agents=("sample", "my_agents:planted"), seeds=(0,), texts=400)
    sampled, best = (run_cell(config, cell) for cell in config.cells)
    assert (sampled.status, best.status) == ("ok", "ok")
    noise = 5 / np.sqrt(400) * 0.5  # of rewards in [0, 1], at most, in 5 standard errors
    bounds = make_task(task).bounds()
    assert sampled.rows[-1]["reward"] == pytest.approx(bounds.language_model, abs=noise)
    assert sampled.rows[-1]["normalised"] == pytest.approx(0, abs=noise / (bounds.best - bounds.language_model))
    assert best.rows[-1]["normalised"] == pytest.approx(1, abs=1e-9)


# --- what goes wrong is recorded, and the rest goes on


@pytest.mark.slow
def test_an_agent_that_raises_or_acts_illegally_is_recorded_as_such(done):
    rows = read(done)
    raises = [row for row in rows if row["agent"] == "my_agents:Raises"]
    illegal = [row for row in rows if row["agent"] == "my_agents:Illegal"]
    assert {row["status"] for row in (*raises, *illegal)} == {"failed"}
    assert {row["error"] for row in raises} == {"ZeroDivisionError: nothing to learn in 200 steps"}
    assert all(row["error"].startswith("IllegalAction: actions must be in 0..") for row in illegal)
    assert raises[0]["reward"]  # measured before it was to learn
    assert {row["status"] for row in rows if "my_agents" not in row["agent"]} == {"ok"}


@pytest.mark.slow
def test_a_process_that_dies_takes_one_run_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("agents.benchmark.grid.get_context", lambda method: CONTEXT)  # a start without imports
    config = replace(CONFIG, tasks=CONFIG.tasks[:1], agents=("sample", "my_agents:Dies", "random"), seeds=(0,))
    results = run_benchmark(config, tmp_path / "b", workers=1)
    assert [result.status for result in results] == ["ok", "failed", "ok"]
    assert "died with exit code 7" in results[1].error


def test_what_an_agent_cannot_do_is_not_its_failure():
    result = run_cell(CONFIG, Cell("TextGen/Needle-v0", "lookahead", 0))
    assert result.status == "inapplicable"
    assert "candidate_scores" in result.error


KILLED = replace(CONFIG, tasks=CONFIG.tasks[:1], agents=("sample", "best_of_n", "text_dqn"))
"""Six runs, of which text_dqn's take long: some are left when two are done."""


def run_with_one_worker(folder):
    run_benchmark(KILLED, folder, workers=1)


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_where_it_was(done, tmp_path):
    folder = tmp_path / "b"
    process = Forked(tmp_path, run_with_one_worker, folder)
    while len(list(folder.glob("cells/*.json"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    recorded = {path: path.read_bytes() for path in folder.glob("cells/*.json")}
    assert 2 <= len(recorded)
    assert all(json.loads(text)["cell"] for text in recorded.values())  # none is half written
    times = {path: path.stat().st_mtime_ns for path in recorded}
    run_benchmark(KILLED, folder, cell_runner=in_this_process)
    assert {path: path.stat().st_mtime_ns for path in recorded} == times
    assert len(list(folder.glob("cells/*.json"))) == 6 > len(recorded)
    assert read(folder) == [
        row for row in read(done) if row["task"].startswith("TextGen/Needle") and row["agent"] in KILLED.agents
    ]


@pytest.mark.slow
def test_sigterm_ends_the_command_and_its_processes_with_143_and_a_line(tmp_path):
    command = ("--tasks", "Needle", "--agents", "sample", "--seeds", 5000, "--out", "b", "--workers", 1)
    process = Forked(tmp_path, textgen, "benchmark", *command)
    while len(list(tmp_path.glob("b/cells/*.json"))) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()
    assert process.returncode == 143
    assert "stopped by SIGTERM: what is done is in b/; the same command goes on" in said
    deadline = time.monotonic() + 30
    while lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not lives(process.pid)


def lives(session):
    """Whether any process of a session does."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_full_disk_loses_nothing_recorded(done, tmp_path, monkeypatch):
    calls, fsync = [], os.fsync

    def full_after_two(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:  # the configuration, and two runs
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    config = replace(CONFIG, agents=("sample", "best_of_n"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_after_two)
        with pytest.raises(RunFolderError, match=r"No space left.*same command again"):
            run_benchmark(config, tmp_path / "b", cell_runner=in_this_process)
    assert len(list((tmp_path / "b" / "cells").iterdir())) == 2
    run_benchmark(config, tmp_path / "b", cell_runner=in_this_process)
    assert read(tmp_path / "b") == [row for row in read(done) if row["agent"] in config.agents]


@pytest.mark.slow
def test_failed_runs_are_only_run_again_when_asked(done, tmp_path):
    folder = tmp_path / "b"
    shutil.copytree(done, folder)
    ran = []

    def runner(config, cells, workers, started):
        ran.extend(cells)
        return in_this_process(config, cells, workers, started)

    run_benchmark(CONFIG, folder, cell_runner=runner)
    assert ran == []
    run_benchmark(CONFIG, folder, cell_runner=runner, retry_failed=True)
    assert {cell.agent for cell in ran} == {"my_agents:Raises", "my_agents:Illegal"}
    assert read(folder) == read(done)


@pytest.mark.slow
def test_a_folder_of_another_configuration_is_refused(done, tmp_path):
    with pytest.raises(RunFolderError, match=r"another configuration: steps 200 instead of 300"):
        run_benchmark(replace(CONFIG, steps=300), done)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="holds no benchmark"):
        run_benchmark(CONFIG, tmp_path)


def test_an_agent_whose_learn_takes_no_steps_is_refused_before_anything_runs(tmp_path):
    config = replace(CONFIG, tasks=CONFIG.tasks[:1], agents=("sample", "my_agents:TakesNoSteps"), seeds=(0,))
    with pytest.raises(ContractError, match=r"'my_agents:TakesNoSteps' must have learn\(steps\): too many positional"):
        run_benchmark(config, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    check_agents(replace(config, agents=("my_agents:TakesSteps",)))


def test_words_of_code_are_code_on_the_page(tmp_path):
    config = replace(CONFIG, tasks=("DelayedKey:delay=2",), agents=("sample",), seeds=(0,))
    results = [run_cell(config, cell) for cell in config.cells]
    write_results(tmp_path / "results.csv", results)
    write_report(tmp_path, config, results)
    page = (tmp_path / "report.html").read_text()
    assert "its reward comes <code>delay</code> tokens later" in page
    assert "`" not in page
    assert "`delay` tokens later" in (tmp_path / "report.md").read_text()


def test_scores_that_could_not_be_normalised_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"no bounds are known.*benchmarks\.bounds"):
        run_benchmark(replace(CONFIG, tasks=("Sentiment:length=3",)), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tasks": ("Needel",)}, UnknownName, "unknown task 'Needel'. Did you mean 'Needle'"),
        ({"tasks": ("Needle:dept=3",)}, UnknownName, "Did you mean 'depth'"),
        ({"tasks": ("Needle:3",)}, ConfigError, "written name=value, got '3'"),
        ({"tasks": ("Needle", "TextGen/Needle-v0")}, ConfigError, "each once; got TextGen/Needle-v0"),
        ({"agents": ("text-dqn",)}, UnknownName, "Did you mean 'text_dqn'"),
        (
            {"agents": ("best_of_n:n=4:m",)},
            ConfigError,
            "a setting of agent 'best_of_n' is written name=value, got 'm'",
        ),
        ({"agents": ("best_of_n:n",)}, ConfigError, "a setting of agent 'best_of_n' is written name=value, got 'n'"),
        ({"agents": ("my_agents:Nobody",)}, ConfigError, "unknown name 'Nobody'"),
        ({"seeds": (3, 1, 3)}, ConfigError, "seeds must be at least one, each once; got 3"),
        ({"seeds": ()}, ConfigError, "got none"),
        ({"seeds": (-1,)}, ConfigError, "a seed must be a whole number of at least 0"),
        ({"evaluations": 1}, ConfigError, "evaluations must be a whole number of at least 2"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        replace(CONFIG, **changes)


# --- comparing


@pytest.mark.slow
def test_an_endless_error_and_a_long_name_are_kept_short_enough_to_be_read(tmp_path):
    endless = Cell("TextGen/Needle-v0", f"{'folder/' * 60}mine.py:Agent", 0)
    assert len(endless.file.encode()) < 200
    assert endless.file != endless._replace(seed=1).file
    write_results(tmp_path / "results.csv", [CellResult(endless, "failed", "0 " * 200_000)])
    (row,) = read_results(tmp_path)
    assert (row["agent"], row["status"], row["error"][:4]) == (endless.agent, "failed", "0 0 ")
    lines = (tmp_path / "results.csv").read_text().replace(",status,", ",state,")
    (tmp_path / "other.csv").write_text(lines)
    with pytest.raises(RunFolderError, match="it has no column 'status'"):
        read_results(tmp_path / "other.csv")
    (tmp_path / "other.csv").write_text(lines + f'"{"0" * 200_000}"')
    with pytest.raises(RunFolderError, match="does not hold the results of a benchmark"):
        read_results(tmp_path / "other.csv")


def test_two_agents_and_two_results_can_be_compared(done):
    ((name, found),) = compare_results("text_dqn", "sample", done)
    assert name == "text_dqn against sample"
    assert [d.task for d in found.by_task] == list(CONFIG.tasks)
    same = dict(compare_results(str(done), str(done / "results.csv"), None))
    assert set(same) == {"sample", "best_of_n", "text_dqn"}
    assert not any(d.significant for found in same.values() for d in (*found.by_task, found.overall))
    for first, folder, message in (("nobody", done, "agent 'nobody' has no finished runs"), ("x", None, "with --out")):
        with pytest.raises(ConfigError, match=message):
            compare_results(first, "sample", folder)
    with pytest.raises(RunFolderError, match="does not hold the results of a benchmark: it has no column 'seed'"):
        read_results(Path(__file__))
    with pytest.raises(ConfigError, match=r"^no results at 'nowhere': give two folders"):
        compare_results(str(done), "nowhere", None)


@pytest.mark.slow
def test_the_command_line_runs_and_compares(tmp_path):
    def textgen(*arguments):
        return CliRunner().invoke(app, ["benchmark", *map(str, arguments)], env={"COLUMNS": "200"})

    common = ("--tasks", "Needle:depth=2", "--agents", "random,best_of_n", "--out", tmp_path / "b", "--workers", 1)
    shown = textgen(*common, "--seeds", 3)
    assert shown.exit_code == 0, shown.output
    assert "6 runs, 0 failed" in shown.stdout
    assert shown.stdout.index("best_of_n") < shown.stdout.index("random")  # the better one comes first
    unable = textgen("--tasks", "Needle:depth=2", "--agents", "os:getcwd", "--out", tmp_path / "c", "--seeds", 1)
    assert "can be made for none of the tasks" in unable.stderr
    assert not (tmp_path / "c").exists()
    assert "at least 1, or a list" in textgen("--seeds", "-3").stderr
    compared = textgen("--compare", "best_of_n", "random", "--out", tmp_path / "b")
    assert "Mann-Whitney" in compared.stdout
    for seeds, message in (
        (",", "must be a number of seeds"),
        ("0,0", "each once; got 0"),
        ("few", "must be a number of seeds"),
    ):
        refused = textgen(*common, "--seeds", seeds)
        assert (refused.exit_code, message in refused.stderr) == (2, True)


# --- the pages


@pytest.mark.slow
def test_the_report_holds_every_table_and_figure(done):
    html, markdown = ((done / f"report.{kind}").read_text() for kind in ("html", "md"))
    for id in ("overall", "tasks", "profiles", "improvement", "curves", "failures", "transcripts"):
        assert f'<section id="{id}">' in html
    assert html.count("<img") == markdown.count("![") == len(list((done / "figures").iterdir())) == 5
    assert 'src="data:image/svg+xml;base64,' in html
    assert not re.search(r"(src|href)=\"(?!data:|#)", html)  # self-contained
    scores = scores_by_agent(read_results(done))
    for agent, tasks in scores.items():
        assert agent in html
        assert markdown.count(f"| {agent.replace('_', chr(92) + '_')} |") >= 2 + len(tasks)


@pytest.mark.slow
def test_single_runs_have_no_interval(done):
    """A bootstrap over one run a task draws the same runs again: its interval would be a point."""
    rows = read_results(done)
    first = [row for row in rows if row["seed"] == 0]
    for some, runs in ((rows, "4 on 2 tasks"), (first, "2 on 2 tasks")):
        ((_, middle, *_, counted),) = overall_table(some, scores_by_agent(some), ["text_dqn"]).rows
        assert counted == runs
        assert ("[" in middle) == (some is rows)


NASTY = "<script>document.title = 'it ran'</script><img src=x onerror=\"document.title='it ran'\">|*bold*"


def nasty_report(done, folder):
    """A report on agents whose texts, prompts and errors are attacks."""
    results = read_cells(done)
    text = {"prompt": NASTY, "completion": NASTY, "reward": 0.0}
    results = [replace(r, transcripts=(text,), error=r.error and NASTY) for r in results]
    shutil.copytree(done, folder)
    write_report(folder, CONFIG, results)
    return folder / "report.html"


@pytest.mark.slow
def test_what_agents_write_is_text_and_nothing_else(done, tmp_path):
    page = nasty_report(done, tmp_path / "b").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    markdown = (tmp_path / "b" / "report.md").read_text()
    assert "<script" not in markdown
    assert "\\|\\*bold\\*" in markdown


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
def test_a_browser_shows_the_report_and_runs_nothing_in_it(done, tmp_path):
    page = nasty_report(done, tmp_path / "b")
    flags = ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update")
    flags = (*flags, "disable-sync", "no-first-run", "dump-dom", f"user-data-dir={tmp_path / 'profile'}")
    shown = subprocess.run(
        [CHROMIUM, *(f"--{flag}" for flag in flags), page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "<title>Benchmark of agents that write</title>" in shown  # nothing has changed it
    assert "&lt;script&gt;" in shown
    assert shown.count("<table") == 1 + 2 + 1 + 1 + 2  # overall, tasks, improvement, failures, transcripts
    assert shown.count("data:image/svg+xml;base64,") == 5
