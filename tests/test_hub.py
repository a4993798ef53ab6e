"""Agents on the hub: what was pushed comes back the same, and a stranger's repository is checked like any folder."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gymnasium as gym
import huggingface_hub
import numpy as np
import pytest
import yaml
from toys import PROMPTS, letters
from typer.testing import CliRunner

from agents import TextDQN, hub
from agents.cli.app import app
from agents.zoo import OBSERVATION
from textgen_env.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The calls that uploads and downloads of models make, on files in memory."""

    files: dict[str, bytes]
    asked: list[str]
    claimed: dict[str, int]  # sizes to claim instead of the true ones

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.asked.append(f"POST {self.path}")
        here = f"http://{self.headers['Host']}/user/agent"
        if self.path == "/api/repos/create":
            answer = {"url": here}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        else:
            assert self.path.endswith("/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"success": True, "commitUrl": f"{here}/commit/{COMMIT}", "commitOid": COMMIT}
        self._send(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def do_HEAD(self):
        self._file(with_body=False)

    def do_GET(self):
        self._file(with_body=True)

    def _file(self, with_body):
        self.asked.append(f"{self.command} {self.path}")
        name = self.path.rpartition("/")[2]
        if not self.path.startswith("/user/agent/resolve/") or name not in self.files:
            error = "EntryNotFound" if self.path.startswith("/user/agent/") else "RepoNotFound"
            self._send(b"", {"X-Error-Code": error, "X-Error-Message": f"{name} is not here"}, 404)
            return
        content = self.files[name]
        etag = hashlib.sha1(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        self._send(content, headers, size=self.claimed.get(name), with_body=with_body)

    def _send(self, content, headers, status=200, size=None, with_body=True):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content) if size is None else size)}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    handler = type("ThisHub", (Hub,), {"files": {}, "asked": [], "claimed": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))  # it looks for its end as often
        thread.start()
        endpoint = f"http://127.0.0.1:{running.server_port}"
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)  # what HF_ENDPOINT sets when it is imported
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield handler
        running.shutdown()
        thread.join()
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def agent():
    env = gym.make_vec("TextGen-v0", num_envs=2, observation=OBSERVATION, top_k=4, max_new_tokens=3)
    return TextDQN(env=env, beta=0.3, buffer_size=100, seed=0)


def pushed(agent, folder, server):
    """Put on the server what ``save_pretrained`` writes."""
    agent.save_pretrained(folder)
    server.files.update({path.name: path.read_bytes() for path in Path(folder).iterdir()})


def test_an_agent_that_was_pushed_comes_back_the_same(agent, server, tmp_path):
    assert agent.push_to_hub("user/agent", token="hf_x").endswith(f"/user/agent/commit/{COMMIT}")
    assert set(server.files) == {"README.md", "agent.json", "model.safetensors"}

    again = TextDQN.from_pretrained("user/agent")

    assert again.beta == 0.3
    stored = agent.policy.state_dict()
    for name, weight in again.policy.state_dict().items():
        np.testing.assert_array_equal(weight.numpy(), stored[name].numpy())


def test_nothing_but_the_two_files_is_downloaded_and_both_are_of_one_commit(agent, server, tmp_path):
    pushed(agent, tmp_path / "folder", server)
    server.files["evil.pkl"] = pickle.dumps(print)
    TextDQN.from_pretrained("user/agent")
    loaded = [call for call in server.asked if call.startswith("GET")]
    assert loaded == [
        "GET /user/agent/resolve/main/agent.json",
        f"GET /user/agent/resolve/{COMMIT}/model.safetensors",
    ]


def test_an_agent_that_was_downloaded_needs_no_network_again(agent, server, tmp_path, monkeypatch):
    pushed(agent, tmp_path / "folder", server)
    TextDQN.from_pretrained("user/agent")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    assert TextDQN.from_pretrained("user/agent").beta == 0.3
    assert not server.asked


def test_the_card_has_the_results_in_the_metadata_of_the_hub(agent, server):
    results = {"reward": 0.61, "kl": 2.0, "parts": {"sentiment": 0.61}, "likelihood": None, "distinct_2": float("nan")}
    agent.push_to_hub("user/agent", results=results, token="hf_x")
    _, metadata, page = server.files["README.md"].decode().split("---\n", 2)
    (model,) = yaml.safe_load(metadata)["model-index"]
    assert model["name"] == "agent"
    metrics = [metric for result in model["results"] for metric in result["metrics"]]
    assert {metric["type"]: metric["value"] for metric in metrics} == {"reward": 0.61, "kl": 2.0}
    assert 'TextDQN.from_pretrained("user/agent"' in page
    assert "base_model" not in yaml.safe_load(metadata)  # "tiny" is no repository


def test_the_card_takes_numbers_of_numpy():
    results = {"reward": np.float32(0.5), "texts": np.int64(9), "greedy": np.bool_(True), "kl": np.float64("inf")}
    _, metadata, _ = hub.card_with_results("---\nbase_model: a/b\n---\n", "user/agent", results).split("---\n", 2)
    (model,) = yaml.safe_load(metadata)["model-index"]
    metrics = [metric for result in model["results"] for metric in result["metrics"]]
    assert {metric["type"]: metric["value"] for metric in metrics} == {"reward": 0.5, "texts": 9}


def test_a_stranger_s_settings_are_checked_as_those_of_a_folder(agent, server, tmp_path):
    pushed(agent, tmp_path / "folder", server)
    settings = json.loads(server.files["agent.json"])
    evil = base64.b64encode(pickle.dumps(print)).decode()
    server.files["agent.json"] = json.dumps(settings | {"policy_class": {":serialized:": evil}}).encode()
    with pytest.raises(ConfigError, match="pickled entries"):
        TextDQN.from_pretrained("user/agent")


def test_a_file_that_is_too_large_is_not_downloaded(agent, server, tmp_path):
    pushed(agent, tmp_path / "folder", server)
    server.claimed["model.safetensors"] = hub.MOST_WEIGHT_BYTES + 1
    with pytest.raises(ConfigError, match=r"model.safetensors of 'user/agent' has 4,294,967,297 bytes, more than"):
        TextDQN.from_pretrained("user/agent")
    assert not [call for call in server.asked if call.startswith("GET") and "safetensors" in call]


@pytest.mark.parametrize("name", ["user/agent", "nobody/none"])
def test_a_repository_without_an_agent_is_an_error_that_names_it(name, server):
    with pytest.raises(ConfigError, match=f"no folder '{name}' is here, and the agent cannot be read from the hub: "):
        TextDQN.from_pretrained(name)


def test_an_id_of_another_form_is_refused_before_anything_is_sent(agent, server):
    with pytest.raises(ConfigError, match="must have the form 'user/agent', got 'agent'"):
        agent.push_to_hub("agent")
    assert not server.asked


def test_a_folder_that_is_here_or_beside_one_that_is_here_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert not hub.is_repository("runs/mine")
    assert not hub.is_repository(tmp_path / "user" / "agent")
    assert not hub.is_repository("./user/agent")
    assert not hub.is_repository("agent")
    assert hub.is_repository("user/agent")
    assert hub.is_repository(Path("user/agent"))


def test_generate_writes_with_an_agent_of_the_hub(agent, server, tmp_path):
    pushed(agent, tmp_path / "folder", server)
    command = ["--prompt", "The movie was", "--num", "2", "--json"]
    found = CliRunner().invoke(app, ["generate", "user/agent", *command])
    assert found.exit_code == 0, found.output
    texts = json.loads(found.stdout)
    assert [text["prompt"] for text in texts] == ["The movie was"] * 2
    assert all(text["completion"] and -1 <= text["reward"] <= 1 for text in texts)  # the stored reward is VADER's
    local = CliRunner().invoke(app, ["generate", str(tmp_path / "folder"), *command])
    assert json.loads(local.stdout) == texts


def test_play_opens_a_page_with_an_agent_of_the_hub(agent, server, tmp_path, launched):
    pushed(agent, tmp_path / "folder", server)
    found = CliRunner().invoke(app, ["play", "user/agent", "--port", "7999"])
    assert found.exit_code == 0, found.output
    ((page, _),) = launched
    names = [block.elem_id for block in page.blocks.values() if type(block).__name__ == "HighlightedText"]
    assert names == ["text-language-model", "text-text_dqn"]
    assert any(call.startswith("GET /user/agent/") and "safetensors" in call for call in server.asked)


def test_generate_shows_no_rewards_of_an_agent_whose_reward_was_not_stored(server, tmp_path):
    env = gym.make_vec("TextGen-v0", num_envs=2, observation=OBSERVATION, reward=len, top_k=4, max_new_tokens=3)
    pushed(TextDQN(env=env, buffer_size=100, seed=0), tmp_path / "folder", server)
    found = CliRunner().invoke(app, ["generate", "user/agent", "--num", "1", "--json"])
    assert json.loads(found.stdout)[0]["reward"] is None
    assert "was not stored" in found.stderr
    (tmp_path / "mine.py").write_text("def score(completion):\n    return 7.0\n")
    found = CliRunner().invoke(app, ["generate", "user/agent", "--num", "1", "--json", "--reward", "mine.py:score"])
    assert json.loads(found.stdout)[0]["reward"] == 7.0


def test_an_agent_on_another_vocabulary_is_refused(server, tmp_path):
    settings = {"model": letters(), "prompts": PROMPTS, "reward": len, "top_k": 4, "max_new_tokens": 4}
    env = gym.make_vec("TextGen-v0", num_envs=2, observation=OBSERVATION, **settings)
    pushed(TextDQN(env=env, buffer_size=100, seed=0), tmp_path / "folder", server)
    found = CliRunner().invoke(app, ["generate", "user/agent"])
    assert found.exit_code == 2
    assert found.stderr.startswith("error: ")
