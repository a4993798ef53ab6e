"""The texts of an agent beside those of the language model: a page of samples, and figures of the texts.

Evaluation before, Evaluation after  ->  samples_page  ->  Markdown
Evaluation, references               ->  text_metrics  ->  figures
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agents.terminal import decimals_for, markdown_cell
from textgen_env.errors import ConfigError
from textgen_env.evaluation import Evaluation
from textgen_env.extras import is_installed

FEWEST_SAMPLES = 8
"""Lines of the page of samples, at least: several texts a prompt where there are few prompts."""


def text_metrics(evaluation: Evaluation, references: Sequence[str | None], most: int) -> dict[str, float]:
    """Return the figures of ``textgen_env.metrics`` for the texts, and those of all rewards.

    Args:
        evaluation: The texts.
        references: Of each of its P prompts; where all have one, texts are compared with them too.
        most: Texts that are looked at: fewer are more diverse, so compare as many with as many.

    Raises:
        ConfigError: another number of references than prompts.
    """
    if len(references) != evaluation.num_prompts:
        raise ConfigError(
            f"references must be one a prompt, {evaluation.num_prompts} here (None where a prompt has none), "
            f"got {len(references)}"
        )
    from evaluate import combine

    from textgen_env.metrics import METRICS

    names, texts = ["distinct", "repetition", "self_bleu"], list(evaluation.completions[:most])
    columns: dict[str, Any] = {"predictions": texts}
    if None not in references:
        names += ["bleu", "chrf", "rouge"]
        columns["references"] = [references[i % len(references)] for i in range(len(texts))]
    if not (is_installed("sacrebleu") and is_installed("rouge_score")):  # the extra [references]
        names = [name for name in names if name not in ("self_bleu", "bleu", "chrf", "rouge")]
        columns.pop("references", None)
    figures: dict[str, float] = combine([METRICS[name]() for name in names]).compute(**columns)
    of_rewards: dict[str, float] = METRICS["reward"]().compute(rewards=evaluation.rewards.tolist())
    return figures | of_rewards


def samples_page(before: Evaluation, after: Evaluation, notes: Sequence[str] = ()) -> str:
    """Return a Markdown page: for each prompt, a text before and after training, with their rewards.

    Raises:
        ConfigError: the two are not of the same prompts.
    """
    if before.prompts[: before.num_prompts] != after.prompts[: after.num_prompts]:
        raise ConfigError(
            f"both sides of the page must be of the same prompts, got {before.num_prompts} and {after.num_prompts}: "
            "evaluate at least one text a prompt"
        )
    decimals = decimals_for([*before.rewards, *after.rewards])
    lines = [
        "# Before and after",
        "",
        *notes,
        "",
        f"Mean reward {before.reward:.{decimals}f} before, {after.reward:.{decimals}f} after. "
        "Below, the first texts of each prompt,",
        "not a selection; both drawn with the same random numbers.",
        "",
        "| prompt | before | reward | after | reward |",
        "|---|---|---:|---|---:|",
    ]
    rounds = -(-FEWEST_SAMPLES // before.num_prompts)
    count = min(rounds * before.num_prompts, len(before.completions), len(after.completions))
    for i in sorted(range(count), key=lambda text: text % before.num_prompts):
        cells = [
            markdown_cell(before.prompts[i]),
            markdown_cell(_said(before, i)),
            f"{before.rewards[i]:.{decimals}f}",
            markdown_cell(_said(after, i)),
            f"{after.rewards[i]:.{decimals}f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _said(evaluation: Evaluation, text: int) -> str:
    """Return a completion, in a conversation with who said what."""
    if not evaluation.turns:
        return evaluation.completions[text]
    return " / ".join(f"{turn.speaker}: {turn.text.strip()}" for turn in evaluation.turns[text])
