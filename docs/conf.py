"""The site's settings: ``make docs`` builds it offline from the pages of this folder and the docstrings."""

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Of this tree, wherever the build starts.
from agents.baselines.one_step import SampleAgent  # noqa: E402
from textgen_env import __version__, make_task  # noqa: E402
from textgen_env.evaluation import roll_out  # noqa: E402
from textgen_env.tasks import TASKS  # noqa: E402

project, author, copyright = "textgen-env", "the textgen-env authors", "the textgen-env authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"textgen-env {release}"
html_copy_source = False

# The same pages are read on GitHub: its anchors, and no syntax of Sphinx's own outside the index.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True


def from_markdown(app, what, name, obj, options, lines):
    """Turn the Markdown of Gymnasium's docstrings (headings, tables) into reStructuredText, in place."""
    found, in_table = [], False
    for line in lines:
        is_row, was_table = line.startswith("|") and line.endswith("|"), in_table
        in_table = is_row
        if is_row and set(line) <= set("|-: "):
            continue
        if is_row:
            cells = [cell.strip() for cell in re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line).strip("|").split(" | ")]
            found += [] if was_table else ["", ".. list-table::", "   :header-rows: 1", ""]
            found += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(cells)]
        elif line.startswith("## "):
            found += [f"**{line[3:]}**", ""]
        else:
            found += ([""] if was_table else []) + [line if line.startswith(" ") else bars_escaped(line)]
    lines[:] = found


def bars_escaped(line):
    """Return ``line`` with the bars of absolute values escaped, outside of code: ``|a - b|`` is a substitution."""
    parts = re.split(r"(``.*?``)", line)
    return "".join(part if part.startswith("``") else part.replace("|", "\\|") for part in parts)


def write_task_pages(app):
    """Write a page for each task: its docstring, sizes and bounds, and a text by the language model."""
    folder = Path(app.srcdir) / "task"
    folder.mkdir(exist_ok=True)
    for id in TASKS:
        name, (summary, _, documented) = id.removeprefix("TextGen/"), inspect.getdoc(TASKS[id]).partition("\n\n")
        task = make_task(id)
        bounds, sizes = task.bounds(), ", ".join(f"`{size}={value!r}`" for size, value in task.sizes.items())
        env = task.make_vec(1, observation=("logprobs", "action_mask"))
        texts = roll_out(SampleAgent(), env, [next(iter(task.test_prompts))], seed=0)
        written = (texts.prompts[0] + texts.completions[0]).replace("\n", "\n    ")
        page = f"# {name}\n\n{summary}\n\n```python\nimport gymnasium as gym, textgen_env\n\n"
        page += f'env = gym.make("{id}")\n```\n\nSizes: {sizes}. Mean reward of the language model '
        page += f"{bounds.language_model:.4f}, the best {bounds.best:.4f}, no text above {bounds.ceiling:g}. "
        page += f"One of its texts, worth {texts.rewards[0]:.2f}:\n\n    {written}\n\n{documented}\n"
        (folder / f"{name}.md").write_text(page, encoding="utf-8")


def setup(app):
    """Register the hooks; called by Sphinx."""
    app.connect("builder-inited", write_task_pages)
    app.connect("autodoc-process-docstring", from_markdown, priority=400)  # before napoleon
