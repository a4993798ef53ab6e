"""``textgen evaluate``: the table and the figures of a trained agent once more, also on other prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from agents.cli.options import (
    AsJson,
    PartnerAgain,
    Prompts,
    RewardAgain,
    Samples,
    Texts,
    Trust,
    change,
    own_object,
    partner_again,
    reward_again,
)
from agents.tables import show_table
from agents.terminal import json_text, open_console, say, table_of
from textgen_env.config import MOST_SEED
from textgen_env.errors import ConfigError, RunFolderError
from textgen_env.files import refuse_links, write_file

if TYPE_CHECKING:
    from rich.table import Table

    from agents.runs.run import Run


def evaluate_command(
    run: Annotated[Path, typer.Argument(help="A folder that 'textgen train' made.", metavar="RUN")],
    prompts: Prompts = None,
    reward: RewardAgain = None,
    partner: PartnerAgain = None,
    texts: Texts = None,
    samples: Samples = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the evaluation's random numbers.", min=0, max=MOST_SEED, show_default="the run's"),
    ] = None,
    particles: Annotated[
        str | None,
        typer.Option(
            help="Also measure what more tokens a text buy, by so many particles (and best-of-n): 1,2,4,8.",
            metavar="N,N,...",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures.", show_default="RUN/evaluation")] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure a trained agent again: the table, and the reward-KL plane as a picture.

    On the run's own test prompts, or on all of --prompts (at most 32 of them). With --particles there is
    a second table, and the share of the optimal gain against tokens a text as a picture.
    """
    from agents.runs.run import load_run
    from agents.runs.spending import check_counts

    counts = _counts(particles)
    console = open_console(stderr=as_json)
    with console.status("loading"):
        again = {"reward": reward_again(run, reward), "partner": partner_again(run, partner)}
        opened = load_run(run, **again, trust=trust)
    if counts and opened.env.episodes.partner is not None:
        raise ConfigError("--particles would ask the partner for its answers in advance: leave it out for this run")
    opened = replace(opened, config=change(opened.config, eval_texts=texts, eval_samples=samples, seed=seed))
    check_counts(opened.agent, opened.env, counts, opened.config.eval_samples)
    if prompts is not None:
        opened = _on_prompts(opened, prompts)
    _measure(opened, counts, out or run / "evaluation", console, as_json)


def _counts(particles: str | None) -> list[int]:
    """Return the numbers of particles to measure, in order.

    Raises:
        ConfigError: no list of whole numbers of at least 1.
    """
    parts = [] if particles is None else particles.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--particles must be whole numbers of at least 1, like 1,2,4,8, got {particles!r}")
    return sorted({int(part) for part in parts})


def _on_prompts(run: Run, prompts: str) -> Run:
    from agents.runs.parts import some_prompts
    from textgen_env.prompts import make_prompts

    chosen = some_prompts(make_prompts(own_object("prompts", prompts)), run.config.eval_prompts, run.config.seed)
    note = f"Prompts: {len(chosen)} of {prompts}."
    return replace(run, test_prompts=chosen, notes=(*run.notes[:-1], note))


def _measure(run: Run, counts: Sequence[int], folder: Path, console: Console, as_json: bool) -> None:
    """Measure the agent, write the figures into ``folder``, and print them."""
    from agents.runs.files import PLANE_FILE, SAMPLES_FILE, SUMMARY_FILE, TOKENS_FILE
    from agents.runs.pictures import draw_plane
    from agents.runs.progress import JobProgress
    from agents.runs.report import report_notes, table
    from agents.runs.samples import samples_page, text_metrics
    from agents.runs.spending import SPENDING_NOTE, draw_tokens, keep_tempered, spend_each, spending_table

    refuse_links(folder)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file: give --out a folder")
    with JobProgress(console, "texts") as progress:
        yardstick = run.yardstick(progress.measuring)
        evaluations = run.evaluate(progress.measuring)
        spending = spend_each(
            run.agent,
            run.env,
            list(run.test_prompts),
            yardstick.samples,
            counts,
            beta=run.config.beta,
            texts=run.config.eval_texts,
            seed=run.config.seed,
            say=lambda way: say(console, f"measuring: {way}"),
        )
    bounds = (yardstick.samples.reward, None if yardstick.is_saturated else float(yardstick.best.value.mean()))
    report = run.report(yardstick, evaluations)
    references = [prompt.reference for prompt in run.test_prompts]
    both = {"language model": yardstick.samples, run.agent_name: evaluations[0]}
    most = min(len(texts.completions) for texts in both.values())
    metrics = {name: text_metrics(texts, references, most) for name, texts in both.items()}
    figures = report.as_dict() | {"metrics": metrics, "spending": [asdict(point) for point in spending]}
    write_file(folder / SUMMARY_FILE, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    write_file(folder / SAMPLES_FILE, samples_page(yardstick.samples, evaluations[0], run.notes))
    draw_plane(report, folder / PLANE_FILE)
    if spending:
        draw_tokens(spending, *bounds, folder / TOKENS_FILE)
        keep_tempered(spending, folder)
    if as_json:
        typer.echo(json_text(figures))
        return
    show_table(console, table(report), *report_notes(report))
    if spending:
        show_table(console, spending_table(spending, *bounds), SPENDING_NOTE)
    show_table(console, _metrics_table(*metrics.values()))
    say(console, f"Figures, picture and texts are in {folder}/")


def _metrics_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    rows = [(name, f"{before[name]:.3f}", f"{after[name]:.3f}") for name in before]
    return table_of(("metric", "language model", "trained agent"), rows)
