"""``textgen``: train an agent, let it write, measure it, and list the names to choose from.

A user's mistake is answered in one line on stderr, with exit code 2; Ctrl-C ends with 130, SIGTERM with 143,
SIGHUP with 129.
Heavy imports wait until a command needs them, so ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from agents.cli.benchmark import benchmark_command
from agents.cli.evaluate import evaluate_command
from agents.cli.generate import generate_command
from agents.cli.list_names import list_command
from agents.cli.narrow_help import Command, Group
from agents.cli.play import play_command
from agents.cli.prune import prune_command
from agents.cli.record import record_command
from agents.cli.train import train_command
from agents.terminal import replace_what_cannot_be_encoded
from textgen_env.errors import TextGenError
from textgen_env.models.device import prepare_process
from textgen_env.terminal import printable


class _Group(Group):
    """Deliberate errors end in one line, not in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TextGenError as error:
            typer.echo(f"error: {printable(error, one_line=True)}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "train": train_command,
    "generate": generate_command,
    "evaluate": evaluate_command,
    "play": play_command,
    "record": record_command,
    "prune": prune_command,
    "benchmark": benchmark_command,
    "list": list_command,
}
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
EXAMPLES = {
    "train": "textgen train --reward examples/my_reward.py:score --beta 0.02 --steps 12000 --out runs/mine",
    "generate": 'textgen generate runs/mine --prompt "Hello" --num 8 --beta 0.05',
    "evaluate": "textgen evaluate runs/mine --prompts food --texts 256 --json",
    "play": "textgen play runs/mine",
    "record": "textgen record runs/mine --episodes 2000 --out data/mine-v0",
    "prune": "textgen prune smollm2 --method ffn --amount 0.2 --heal 200 --out models/small",
    "benchmark": "textgen benchmark --tasks Needle,Dyck --agents dqn,text_dqn --seeds 5 --out runs/two",
    "list": "textgen list rewards",
}
"""Below each command's help."""

for name, command in COMMANDS.items():
    app.command(name, cls=Command, epilog=f"Example: {EXAMPLES[name]}", context_settings=HELP_OPTIONS)(command)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        typer.echo(f"textgen-env {metadata.version('textgen-env')}")
        raise typer.Exit


@app.callback(context_settings=HELP_OPTIONS)
def textgen(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Text generation as a reinforcement learning environment: train, generate, evaluate."""


def main() -> None:
    """Run the command line: the console script ``textgen``."""
    prepare_process()
    replace_what_cannot_be_encoded()
    app()
