"""``textgen``: train an agent, let it write, measure it, and see what there is to choose from.

What a user got wrong is answered in one line on stderr, with exit code 2; Ctrl-C ends with 130, SIGTERM with 143.
Heavy imports wait until a command needs them, so ``--help`` is quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from textgen_env.errors import ConfigError, TextGenError

if TYPE_CHECKING:
    from agents.benchmark.pages import PageTable
    from agents.runs.config import RunConfig
    from agents.runs.run import RunResult
    from textgen_env.policies import Agent
    from textgen_env.vector_env import TextGenVectorEnv

INTERRUPTED = 130


class _Group(TyperGroup):
    """Deliberate errors end in one line, not in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TextGenError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Text generation as a reinforcement learning environment: train, generate, evaluate.",
)


def main() -> None:
    """Run the command line: the console script ``textgen``."""
    app()


Prompts = Annotated[
    str | None,
    typer.Option(help="openings, one of its topics, or a .txt or .jsonl file; see 'textgen list prompts'."),
]
Texts = Annotated[int | None, typer.Option(help="Texts to measure each agent on.", min=1, show_default="512")]
Samples = Annotated[
    int | None,
    typer.Option(help="Samples a prompt to estimate the best possible policy from.", min=2, show_default="64"),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Load agents other than text_dqn too; doing so runs what code their file holds.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
EngineName = Annotated[str, typer.Option(help="Who does the work: local, this machine alone; or ray.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="With --engine ray: HOST:PORT of a cluster's head, or auto for the one that this machine is part of.",
        show_default="Ray starts here",
    ),
]

WHERE = {"resume", "engine", "actors", "address"}
"""Options of ``train`` that say where a run is worked on; all others say which run it is."""


@app.command()
def train(
    out: Annotated[
        Path | None, typer.Option(help="Folder for the run; must be new or empty.", show_default="runs/AGENT")
    ] = None,
    agent: Annotated[
        str | None, typer.Option(help="See 'textgen list agents'.", show_default="text_dqn", metavar="NAME")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Language model: a name, folder, hub id, or .gguf file.", show_default="tiny"),
    ] = None,
    prune: Annotated[
        str | None,
        typer.Option(
            help="Prune the language model once: METHOD:AMOUNT, the share to remove, or none.",
            show_default="none",
        ),
    ] = None,
    prompts: Prompts = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="A name, or JSON: '{\"sentiment\": 1, \"repetition\": -0.5}'. See 'textgen list rewards'.",
            show_default="sentiment",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Environment steps to learn from, one token each.", min=1, show_default="70000")
    ] = None,
    envs: Annotated[int | None, typer.Option(help="Texts written at a time.", min=1, show_default="64")] = None,
    seed: Annotated[int | None, typer.Option(help="Of prompts, agent and evaluation.", show_default="0")] = None,
    beta: Annotated[float | None, typer.Option(help="Price of KL, in reward units a nat.", show_default="0.1")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Candidates a step: the number of actions.", min=1, show_default="16")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length limit of a text, in tokens.", min=1, show_default="20")
    ] = None,
    min_new_tokens: Annotated[
        int | None,
        typer.Option(help="No end of text before so many tokens.", min=0, show_default="as --max-new-tokens"),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Length limit of a prompt, in tokens.", min=1, show_default="64")
    ] = None,
    candidate_scores: Annotated[
        bool, typer.Option("--candidate-scores", help="Let the agent see what each candidate would score.")
    ] = False,
    texts: Texts = None,
    samples: Samples = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps from one checkpoint to the next; 0 for none.", min=0, show_default="20000"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Start from the config.json of another run; other options go over it.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder, from its last checkpoint.", metavar="RUN")
    ] = None,
    engine: EngineName = "local",
    actors: Annotated[
        int | None, typer.Option(help="With --engine ray: processes that write.", min=1, show_default="the cores")
    ] = None,
    address: Address = None,
) -> None:
    """Train an agent, measure it on prompts that it has not seen, and keep the run in a folder.

    Without options the small model in the box learns to write positive texts of 20 tokens (VADER's
    compound score, -1 to 1).
    """
    given = sorted({name for name, value in locals().items() if value not in (None, False)} - WHERE)
    from agents.runs import run as runs
    from agents.runs.config import RunConfig
    from agents.zoo import OBSERVATION

    console = Console()
    where = runs.local
    if _on_ray(engine, actors=actors, address=address):
        from agents.distributed.actors import RayTextSource
        from textgen_env.models.device import own_cores

        where = RayTextSource(actors or own_cores(), address)
    if resume is not None:
        if given:
            options = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ConfigError(f"a run is resumed with its own configuration: leave out {options}")
        _show_result(runs.resume(resume, text_source=where, console=console), console)
        return
    settings = _changed(
        RunConfig.from_json(_read(config)) if config else RunConfig(),
        agent=agent,
        model=model,
        prune=prune,
        prompts=prompts,
        reward=_reward(reward),
        steps=steps,
        envs=envs,
        seed=seed,
        beta=beta,
        eval_texts=texts,
        eval_samples=samples,
        checkpoint_every=checkpoint_every,
    )
    env: dict[str, Any] = {"top_k": top_k, "max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens}
    env["min_new_tokens"] = max_new_tokens if min_new_tokens is None else min_new_tokens
    env["observation"] = (*OBSERVATION, "candidate_scores") if candidate_scores else None
    chosen = {name: value for name, value in env.items() if value is not None}
    settings = replace(settings, env={**settings.env, **chosen})
    folder = out or _free_folder(Path("runs"), settings.agent)
    _show_result(runs.train(settings, folder, text_source=where, console=console), console)


def _on_ray(engine: str, **options: Any) -> bool:
    """Return whether the work is to be done by Ray; refuse what is of Ray alone otherwise."""
    if engine not in ("local", "ray"):
        raise ConfigError(f"--engine must be local or ray, got {engine!r}")
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if engine == "local" and given:
        raise ConfigError(f"{' and '.join(given)} belong to a cluster: add --engine ray")
    return engine == "ray"


def _show_result(result: RunResult, console: Console) -> None:
    """Print the table of a run and what became of it; one that was stopped ends with 128 + the signal's number."""
    from agents.runs.report import table

    if result.report is not None:
        console.print(table(result.report))
    state = "finished" if result.finished else "stopped early: what there is was saved"
    console.print(
        f"{state}. {result.steps:,} steps in {result.seconds:.0f} s of training. Everything is in {result.folder}/"
    )
    if not result.finished:
        raise typer.Exit(INTERRUPTED if result.signum is None else 128 + result.signum)
    console.print(f'try: textgen generate {result.folder} --prompt "The movie was"')


@app.command()
def generate(
    run: Annotated[Path | None, typer.Argument(help="A folder that 'textgen train' made.", metavar="[RUN]")] = None,
    prompt: Annotated[str, typer.Option(help="How the texts begin.", metavar="TEXT")] = "The movie was",
    num: Annotated[int, typer.Option(help="Texts.", min=1)] = 4,
    model: Annotated[
        str | None, typer.Option(help="Without RUN: sample this language model itself, from its 16 likeliest tokens.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="Without RUN: what to score the texts with.", show_default="sentiment")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Without RUN: length limit of a text, in tokens.", min=1, show_default="32")
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            help="Acting temperature, in reward units a nat: smaller for more reward and more KL.",
            show_default="the run's",
        ),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the most probable token at every step.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write texts with a trained agent, or with a language model itself.

    With --json: a list of objects with prompt, completion, reward, and logprob (nats, of the
    completion under the language model).
    """
    from agents.runs.run import load_run
    from textgen_env.evaluation import roll_out
    from textgen_env.prompts import Prompt

    if (run is None) == (model is None):
        raise ConfigError("give either the folder of a run, or --model for the language model itself")
    start = Prompt(prompt)
    agent: Agent
    if run is None:
        if beta is not None:
            raise ConfigError("--beta is the temperature of a trained agent; the language model itself has none")
        agent, env = _language_model(model, reward, max_new_tokens or 32, rows=min(num, 64))
    else:
        if reward is not None or max_new_tokens is not None:
            raise ConfigError("--reward and --max-new-tokens are those that the run was trained with; leave them out")
        opened = load_run(run, trust=trust)
        agent, env, greedy = opened.agent, opened.env, greedy or opened.greedy
        if beta is not None:
            if not hasattr(opened.agent, "beta"):
                raise ConfigError(f"agent {opened.config.agent!r} has no acting temperature; leave --beta out")
            opened.agent.beta = beta
    texts = roll_out(agent, env, [start] * num, seed, deterministic=greedy)
    written = [
        {"prompt": prompt, "completion": completion, "reward": float(value), "logprob": float(logprob)}
        for completion, value, logprob in zip(texts.completions, texts.rewards, texts.logprobs, strict=True)
    ]
    if as_json:
        typer.echo(json.dumps(written, indent=2, ensure_ascii=False))
        return
    for text in written:
        typer.echo(f"{text['reward']:+.3f}  {text['prompt']}|{text['completion']}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A folder that 'textgen train' made.", metavar="RUN")],
    prompts: Prompts = None,
    texts: Texts = None,
    samples: Samples = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the evaluation's random numbers.", show_default="the run's")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures.", show_default="RUN/evaluation")] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure a trained agent again: the table, and the reward-KL plane as a picture.

    On the run's own test prompts, or on all of --prompts (at most 32 of them).
    """
    from agents.runs.report import draw_plane, samples_page, table, text_metrics
    from agents.runs.run import load_run
    from textgen_env.evaluation import choose_prompts
    from textgen_env.prompts import make_prompts

    console = Console(stderr=as_json)
    with console.status("loading"):
        opened = load_run(run, trust=trust)
    opened = replace(opened, config=_changed(opened.config, eval_texts=texts, eval_samples=samples, seed=seed))
    if prompts is not None:
        chosen = choose_prompts(make_prompts(prompts), opened.config.eval_prompts, opened.config.seed)
        note = f"Prompts: {len(chosen)} of {prompts}."
        opened = replace(opened, test_prompts=chosen, notes=(*opened.notes[:-1], note))
    with console.status("measuring") as status:
        yardstick = opened.yardstick(lambda what: status.update(f"measuring: {what}"))
        evaluations = opened.evaluate(lambda what: status.update(f"measuring: {what}"))
    report = yardstick.report(opened.agent_name, evaluations, opened.notes)
    folder = out or run / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    references = [prompt.reference for prompt in opened.test_prompts]
    metrics = {
        "language model": text_metrics(yardstick.samples, references),
        opened.agent_name: text_metrics(evaluations[0], references),
    }
    figures = json.dumps(report.as_dict() | {"metrics": metrics}, indent=2, ensure_ascii=False)
    (folder / "summary.json").write_text(figures + "\n", encoding="utf-8")
    page = samples_page(yardstick.samples, evaluations[0], opened.notes)
    (folder / "samples.md").write_text(page, encoding="utf-8")
    draw_plane(report, folder / "plane.png")
    if as_json:
        typer.echo(figures)
    else:
        console.print(table(report))
        grid = Table("metric", "language model", "trained agent", box=None)
        before, after = metrics.values()
        for name in before:
            grid.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}")
        console.print(grid)
        console.print(f"Figures, picture and texts are in {folder}/")


@app.command()
def record(
    out: Annotated[
        Path, typer.Option(help="Folder for the dataset; must be new or empty. Minari finds names like sentiment-v0.")
    ],
    run: Annotated[Path | None, typer.Argument(help="A folder that 'textgen train' made.", metavar="[RUN]")] = None,
    episodes: Annotated[int, typer.Option(help="Texts.", min=1)] = 1000,
    model: Annotated[str | None, typer.Option(help="Without RUN: sample this language model itself.")] = None,
    prompts: Prompts = None,
    reward: Annotated[
        str | None, typer.Option(help="Without RUN: what to score the texts with.", show_default="sentiment")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Without RUN: length limit of a text, in tokens.", min=1, show_default="20")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Without RUN: candidates a step.", min=1, show_default="16")] = None,
    candidate_scores: Annotated[
        bool, typer.Option("--candidate-scores", help="Without RUN: record what each candidate would score.")
    ] = False,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the most probable token at every step.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
) -> None:
    """Record texts of a trained agent, or of a language model itself, as a Minari dataset.

    With all that was observed, the masks, and the log-probability of every action: what offline
    learning needs (see docs/clients.md).
    """
    import gymnasium as gym

    from agents.baselines.one_step import SampleAgent
    from agents.runs.config import ENV_SETTINGS
    from agents.runs.run import load_run
    from agents.text_dqn.offline import record as write
    from textgen_env.evaluation import choose_prompts
    from textgen_env.prompts import make_prompts

    if (run is None) == (model is None):
        raise ConfigError("give either the folder of a run, or --model for the language model itself")
    chosen: dict[str, Any] = {"reward": _reward(reward), "max_new_tokens": max_new_tokens, "top_k": top_k}
    given = {name: value for name, value in chosen.items() if value is not None}
    agent: Agent
    if run is None:
        keys = (*ENV_SETTINGS["observation"], "candidate_scores") if candidate_scores else ENV_SETTINGS["observation"]
        settings = {"max_new_tokens": 20, "prompts": prompts, "model": model, **given, "observation": list(keys)}
        env: Any = gym.make_vec("TextGen-v0", num_envs=min(episodes, 64), **settings)
        agent, name = SampleAgent(), "language model"
    else:
        if given or candidate_scores:
            raise ConfigError(
                "--reward, --max-new-tokens, --top-k and --candidate-scores are those of the run; leave them out"
            )
        opened = load_run(run)
        agent, env, name = opened.agent, opened.env, opened.config.agent
    source = choose_prompts(env.episodes.prompts if prompts is None else make_prompts(prompts), episodes, seed)
    texts = [source[i % len(source)] for i in range(episodes)]
    dataset = write(agent, env, texts, out, seed=seed, deterministic=greedy, metadata={"algorithm_name": name})
    Console().print(f"{dataset.total_episodes:,} texts of {dataset.total_steps:,} tokens are in {out}/")


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="A name, folder or hub id.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="Folder for the pruned model; must not hold one.")],
    method: Annotated[str, typer.Option(help="See 'textgen list pruning'.")] = "ffn",
    amount: Annotated[
        float, typer.Option(help="Share of the weights, channels, groups or layers to remove, in [0, 1).")
    ] = 0.2,
    cuts: Annotated[
        str | None,
        typer.Option(help="Instead of both: one cut after another, such as layers:0.1+ffn:0.23.", metavar="M:A+..."),
    ] = None,
    heal: Annotated[int, typer.Option(help="Gradient steps of distillation from the dense model.", min=0)] = 0,
    text: Annotated[
        Path | None,
        typer.Option(
            help="What to calibrate and heal on: a file with a text a line, like those it is to write.",
            show_default="the model writes its own",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the text that the model writes for itself.")] = 0,
) -> None:
    """Prune a model, heal it by distillation, and save it as a folder that --model takes."""
    from agents.pruning.healing import prune_and_heal
    from agents.pruning.methods import parse_pruning

    chosen = [(method, amount)] if cuts is None else parse_pruning(cuts)
    texts = None if text is None else _read(text).splitlines()
    report = prune_and_heal(model, out, chosen, heal, texts=texts, seed=seed)
    Console().print(f"{report}. The model is in {out}/")


@app.command()
def benchmark(
    tasks: Annotated[
        str,
        typer.Option(
            help="diagnostic, language, all, or names, with sizes: Needle:depth=6,Dyck. See 'textgen list tasks'."
        ),
    ] = "diagnostic",
    agents: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated. See 'textgen list agents'; your own: module:attribute.", show_default="all"
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many, from 0 on; or a comma-separated list.", show_default="5")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Environment steps for an agent to learn from.", min=1, show_default="20000")
    ] = None,
    envs: Annotated[int | None, typer.Option(help="Texts written at a time.", min=1, show_default="32")] = None,
    texts: Annotated[
        int | None, typer.Option(help="Texts of each evaluation, at least.", min=1, show_default="64")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; goes on where it stopped.", show_default="runs/benchmark"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Six agents, three seeds and few steps, unless said otherwise.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes.", min=1, show_default="the cores")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what is recorded as failed.")] = False,
    engine: EngineName = "local",
    address: Address = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            help="Run nothing: which differences are significant between two folders (or CSV files) of results, or "
            "between two agents in --out.",
        ),
    ] = None,
) -> None:
    """Run agents on tasks with several seeds, and report what is known of each.

    A folder belongs to one configuration. The same command goes on where it stopped: by Ctrl-C, a kill or a full disk.
    """
    console = Console()
    if compare is not None:
        from agents.benchmark.pages import COMPARISON_NOTE, compare_results, comparison_table

        for name, found in compare_results(*compare, out):
            chance = f"[{found.improvement_low:.2f}, {found.improvement_high:.2f}]"
            console.print(_grid(comparison_table(name, found)))
            console.print(f"Probability that the first is better: {found.improvement:.2f} {chance}\n", markup=False)
        console.print(COMPARISON_NOTE, markup=False)
        return
    from agents.benchmark import grid as runs
    from agents.benchmark.pages import overall_table, read_results, scores_by_agent, write_report
    from agents.runs.signals import Stopped, stop_signals
    from agents.zoo import agent_names

    if ":" in (agents or ""):
        sys.path.insert(0, str(Path.cwd()))  # for module:attribute; processes inherit it
    given = {"seeds": _seeds(seeds), "steps": steps, "envs": envs, "texts": texts}
    settings: dict[str, Any] = {"agents": agent_names(), **(runs.QUICK if quick else {})}
    settings |= {name: value for name, value in given.items() if value is not None}
    settings |= {"agents": tuple(agents.split(","))} if agents else {}
    config = runs.BenchmarkConfig(tasks=runs.task_ids(tasks), **settings)
    spread: runs.CellRunner = runs.run_in_processes
    if _on_ray(engine, address=address):
        from agents.distributed.cells import RayCellRunner

        spread = RayCellRunner(address, workers)
    folder = out or Path("runs/benchmark")
    try:
        with stop_signals(lambda signum: False):
            results = runs.run_benchmark(
                config, folder, workers=workers, retry_failed=retry_failed, engine=spread, console=console
            )
    except Stopped as stop:
        console.print(f"stopped by {stop.name}: what is done is in {folder}/; the same command goes on")
        raise typer.Exit(128 + stop.signum) from stop
    write_report(folder, config, results)
    rows = read_results(folder)
    scores = scores_by_agent(rows)
    console.print(_grid(overall_table(rows, scores, [agent for agent in config.agents if agent in scores])))
    failed = sum(result.status == "failed" for result in results)
    unable = sorted({result.cell.agent for result in results if result.status == "inapplicable"})
    if unable:
        console.print(f"cannot do some task, report.md says why: {', '.join(unable)}", markup=False)
    console.print(f"{len(results)} runs, {failed} failed. Report: {folder}/report.html, report.md; rows: results.csv")


def _grid(table: PageTable) -> Table:
    """Return a table of a report for the terminal."""
    grid = Table(*table.headings, title=table.title or None, title_justify="left", box=None)
    for row in table.rows:
        grid.add_row(*map(escape, row))
    return grid


def _seeds(text: str | None) -> tuple[int, ...] | None:
    """Return the seeds that ``5`` or ``0,3,4`` stands for."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds must be a number of seeds, or a list such as 0,1,2; got {text!r}") from error
    if "," in text:
        return tuple(numbers)
    if numbers[0] < 1:
        raise ConfigError(f"--seeds must be at least 1, or a list such as 0,1,2; got {text!r}")
    return tuple(range(numbers[0]))


@app.command("list")
def list_names(
    what: Annotated[
        str | None, typer.Argument(help="agents, models, prompts, pruning, rewards or tasks; all unless said.")
    ] = None,
) -> None:
    """List the names that the other commands take."""
    from textgen_env.registry import unknown_name

    known = ("agents", "models", "prompts", "pruning", "rewards", "tasks")
    if what is not None and what not in known:
        raise unknown_name("list", what, known)
    console = Console()
    for kind in known if what is None else (what,):
        grid = Table("name", "what it is", title=kind, title_justify="left", box=None)
        for name, about in _names(kind):
            grid.add_row(name, about)
        console.print(grid, "")


def _names(kind: str) -> Iterator[tuple[str, str]]:
    """Yield name and description of everything of a kind."""
    if kind == "models":
        from textgen_env.models import MODEL_NAMES

        yield from MODEL_NAMES.items()
    elif kind == "prompts":
        from textgen_env.openings import OPENINGS
        from textgen_env.prompts import make_prompts

        yield "openings", f"all {len(make_prompts('openings'))} openings in the box"
        for topic in OPENINGS:
            yield topic, f"{len(make_prompts(topic))} of them, such as: {make_prompts(topic)[0].text}"
    elif kind == "rewards":
        from textgen_env.rewards import REWARDS

        yield from ((name, _first_line(REWARDS[name])) for name in sorted(REWARDS))
    elif kind == "tasks":
        from textgen_env.tasks import TASKS, make_task

        for id in TASKS:
            sizes = ", ".join(f"{name}={value}" for name, value in make_task(id).sizes.items())
            yield id, f"{_first_line(TASKS[id])} ({sizes})"
    elif kind == "pruning":
        from agents.pruning.methods import METHODS

        yield from ((name, _first_line(METHODS[name])) for name in METHODS)
    else:
        from agents.baselines.one_step import SEARCH_AGENTS
        from agents.baselines.planning import PLANNING_AGENTS
        from agents.zoo import AGENTS

        yield from ((name, _first_line(AGENTS[name])) for name in AGENTS)
        for unlearned in (SEARCH_AGENTS, PLANNING_AGENTS):
            yield from ((name, f"{_first_line(unlearned[name])} (no learning)") for name in unlearned)


def _first_line(documented: object) -> str:
    return (documented.__doc__ or "").strip().splitlines()[0]


def _changed(config: RunConfig, **options: Any) -> RunConfig:
    """Return ``config`` with the options that were given."""
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("prune") == "none":
        given["prune"] = None
    return replace(config, **given)


def _reward(text: str | None) -> Any:
    """Return a reward's name, or what its JSON says."""
    if text is None or not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--reward looks like JSON but is none: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}") from error


def _free_folder(parent: Path, name: str) -> Path:
    """Return the first of ``parent/name``, ``parent/name-2``, ... that does not exist."""
    names = (name if n == 1 else f"{name}-{n}" for n in range(1, sys.maxsize))
    return next(parent / free for free in names if not (parent / free).exists())


def _language_model(
    model: str | None, reward: str | None, new_tokens: int, rows: int
) -> tuple[Agent, TextGenVectorEnv]:
    from agents.baselines.one_step import SampleAgent
    from textgen_env.models import load_language_model
    from textgen_env.vector_env import TextGenVectorEnv

    loaded = load_language_model(model)
    settings: dict[str, Any] = {
        "top_k": min(16, loaded.vocab_size - len(loaded.end_ids)),
        "max_new_tokens": new_tokens,
        "max_prompt_tokens": max(1, min(512, loaded.max_context - new_tokens)),
    }
    return SampleAgent(), TextGenVectorEnv(rows, loaded, None, _reward(reward) or "sentiment", **settings)
