"""``textgen prune``: a smaller or sparser language model, in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agents.cli.options import Seed, own_object
from agents.terminal import open_console, say
from textgen_env.errors import ConfigError
from textgen_env.files import read_text


def prune_command(
    model: Annotated[str, typer.Argument(help="A name, folder or hub id, or FILE.py:NAME.", metavar="MODEL")],
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
    seed: Seed = 0,
) -> None:
    """Prune a model, heal it by distillation, and save it as a folder that --model takes."""
    from agents.pruning.healing import prune_and_heal
    from agents.pruning.methods import parse_pruning

    chosen = [(method, amount)] if cuts is None else parse_pruning(cuts)
    texts = None if text is None else read_text(text).splitlines()
    report = prune_and_heal(_named(model), out, chosen, heal, texts=texts, seed=seed)
    say(open_console(), f"{report}. The model is in {out}/")


def _named(model: str) -> Any:
    """Return a name, or the model and tokenizer that the user's own code makes."""
    from transformers import PreTrainedModel

    found = own_object("model", model)
    if isinstance(found, str):
        return found
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], PreTrainedModel)):
        raise ConfigError(
            f"{model!r} must be (model, tokenizer) of transformers to be pruned, got {type(found).__name__}"
        )
    return found
