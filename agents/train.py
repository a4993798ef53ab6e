"""The earlier path of ``agents.runs``, kept for scripts that name it."""

from agents.runs.config import ENV_SETTINGS, RunConfig
from agents.runs.run import Run, RunResult, load_run, open_run, resume, train
from agents.zoo import OBSERVATION

__all__ = ["ENV_SETTINGS", "OBSERVATION", "Run", "RunConfig", "RunResult", "load_run", "open_run", "resume", "train"]
