"""What is shown on a terminal: control characters, markup, long paths, poor encodings, pages of Markdown."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import unicodedata

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from typer.testing import CliRunner

from agents.cli.app import app
from agents.tables import show_table
from agents.terminal import decimals_for, markdown_cell, open_console, say, status_text, table_of
from textgen_env.terminal import printable

NASTY = "a\x1b[2J\x9b31m\rb\x00\x07[red]c[/b]\u202ed\ud800"
SHOWN = "a\\x1b[2J\\x9b31m\\x0db\\x00\\x07[red]c[/b]\\u202ed\\ud800"


@pytest.mark.parametrize(
    ("values", "decimals"),
    [
        *(([0.5, 0.001], 2), ([0.1], 2), ([-30.0, 0.0], 2), ([0.0], 2), ([], 2), ([float("nan")], 2)),
        *(([0.099], 4), ([0.02, -0.01], 4), ([0.00123], 5), ([-4e-9], 11)),
    ],
)
def test_small_numbers_have_three_digits_and_others_two_decimals(values, decimals):
    assert decimals_for(values) == decimals


def test_control_characters_are_escapes_and_everything_that_prints_stays():
    assert printable(NASTY) == SHOWN
    kept = "naïve 👩\u200d🚀 हिन्दी नमस्ते\n\tשלום 日本 é"
    assert printable(kept) == kept
    assert printable("a\nb", one_line=True) == "a\\nb"
    for code in range(0x110000):
        if unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp") and chr(code) not in "\n\t":
            assert printable(chr(code)).startswith("\\")


def shown_by(use, **options):
    file = io.StringIO()
    use(Console(file=file, width=40, **options))
    return file.getvalue()


def test_a_terminal_without_a_width_is_shown_what_others_are(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "0")
    show_table(open_console(), table_of(["name"], [["a cell"]]))
    say(open_console(), "a line")
    assert capsys.readouterr().out.split() == ["name", "a", "cell", "a", "line"]


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "color_system": None}, {"markup": True}])
def test_lines_tables_and_states_show_text_as_it_is(options):
    assert shown_by(lambda console: say(console, NASTY * 3), **options) == SHOWN * 3 + "\n"  # whole, in 40 columns
    assert SHOWN[:20] in shown_by(lambda console: console.print(table_of(["name"], [[NASTY[:14]]])), **options)
    assert shown_by(lambda console: console.print(status_text("[b]x[/b]\x1b"), end=""), markup=True) == "[b]x[/b]\\x1b"


COMMANDS = """
import json, sys
from agents.cli.app import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["textgen", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    sys.stdout.flush()
    sys.stdout.buffer.write(bytes(1))
    sys.stdout.flush()
"""


def run(*commands, cwd, **env):
    """What commands print, one after the other in a process whose console has its encoding from the start."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()} | env,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(bytes(1))[:-1]


def test_an_error_is_one_line_without_control_characters_whatever_the_path(tmp_path):
    for path in (tmp_path / ("long" * 40) / "x\x1b[2J\n[/b]", tmp_path / b"\xff".decode(errors="surrogateescape")):
        result = CliRunner().invoke(app, ["evaluate", str(path)])
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert "\x1b" not in result.stderr
        assert ("long" * 40 in result.stderr and "[/b]" in result.stderr) or "\\udcff" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_of_a_poor_encoding_gets_replacements_and_json_stays_json(tmp_path, encoding):
    options = ("--model", "tiny", "--prompt", "日本 – é", "--num", "1", "--max-new-tokens", "2")
    commands = ("generate", *options), ("generate", *options, "--json"), ("list", "models")
    plain, as_json, listed = run(*commands, cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert encoding == "ascii" or b"??" in plain  # click writes UTF-8 where Python says ASCII
    assert json.loads(as_json)[0]["prompt"] == "日本 – é"
    assert b"smollm2" in listed


@pytest.mark.parametrize("seed", ["-1", "4294967296", "1e3"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--steps", "1"],
        ["generate", "--model", "tiny"],
        ["evaluate", "run"],
        ["record", "--model", "tiny", "--out", "x"],
        ["prune", "tiny", "--out", "x"],
    ],
)
def test_a_seed_out_of_range_is_refused_by_name(arguments, seed):
    result = CliRunner().invoke(app, [*arguments, "--seed", seed], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert "--seed" in result.stderr
    benchmark = CliRunner().invoke(app, ["benchmark", "--seeds", f"{seed},1"])
    assert benchmark.exit_code == 2
    assert "seed" in benchmark.stderr


# --- pages of Markdown


@pytest.mark.parametrize(
    "text",
    [
        "[click](http://evil.example)",
        "![image](http://evil.example/x.png)",
        "<http://evil.example>",
        "http://evil.example and www.evil.example",
        "write to a@evil.example",
        "a | b \\| c \\\\| d",
        "**bold** _italic_ `code` ~~gone~~ \\",
        "<script>alert(1)</script> &lt; &amp;",
        "[ref]: http://evil.example",
        "$x$ and \x1b[2J",
    ],
)
def test_generated_text_is_no_markdown(text):
    page = f"| a | b |\n|---|---|\n| {markdown_cell(text)} | end |\n"
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(page)
    assert not re.search(r"https?:|www\.|@", markdown_cell(text))  # GitHub makes links of bare addresses
    assert html.count("<td>") == 2
    assert "<td>end</td>" in html
    for tag in ("<a ", "<img", "<em>", "<strong>", "<code>", "<s>", "<script"):
        assert tag not in html
    import html as entities

    (cell,) = (line[4:-5] for line in html.splitlines() if line.startswith("<td>") and line != "<td>end</td>")
    assert entities.unescape(cell) == printable(text)
