"""The playground as people see it: in headless Chromium, on a server in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from chromium import CHROMIUM, PATIENCE, Chromium
from serve import HOSTILE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="the page needs textgen-env[play]"),
]
MODEL, AGENT = "language-model", "lookahead"
PROMPT = "document.querySelector('#prompt textarea, #prompt input')"
BETA = "document.querySelector('#beta input[type=number]')"
WRITE_ALL = "document.querySelector('#write-all')"


@pytest.fixture(scope="module")
def address():
    """The address of a playground on the exact model of ``serve``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    served = subprocess.Popen([sys.executable, str(Path(__file__).with_name("serve.py")), str(port)])
    address, end = f"http://127.0.0.1:{port}/", time.monotonic() + PATIENCE
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=PATIENCE):
                break
            assert served.poll() is None, "the server has ended"
            assert time.monotonic() < end, "the server does not answer"
            time.sleep(0.1)
        yield address
    finally:
        served.terminate()
        served.wait(PATIENCE)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def open_page(browser, address):
    """Return a function that gives a new visitor, before the page that has loaded."""

    def opened():
        visitor = browser.visitor(address)
        visitor.wait_for(f"{state(AGENT)} && {cell(AGENT, 0)}")
        return visitor

    browser.dialogs.clear()
    return opened


def state(writer):
    return f"document.querySelector('#state-{writer} textarea, #state-{writer} input')?.value"


def tokens(writer):
    return f"[...document.querySelectorAll('#text-{writer} .token')]"


def texts(writer):
    return f"{tokens(writer)}.map(token => token.innerText.trim())"


def cell(writer, line, column=0, table="next"):
    return f"document.querySelector('#{table}-{writer} [data-testid=cell-{line}-{column}]')"


def cells(writer, column, table="next"):
    found = f"document.querySelectorAll('#{table}-{writer} [role=gridcell][data-col=\"{column}\"]')"
    return f"[...{found}].map(cell => cell.innerText.trim())"


def choose(visitor, way):
    visitor.click(f"[...document.querySelectorAll('#way label')].find(label => label.innerText.trim() == '{way}')")


def until(visitor, expression, value):
    """Wait until an expression has a value, which is plain data."""
    visitor.wait_for(f"JSON.stringify({expression}) == {json.dumps(json.dumps(value, separators=(',', ':')))}")


def ended(writer):
    return f"{state(writer)}.includes('ended')"


def test_a_person_goes_from_a_prompt_to_a_finished_text_in_both_columns(open_page):
    visitor = open_page()
    (left, top, width, _), (other_left, other_top, other_width, _) = (
        visitor.evaluate(f"(({{x, y, width, height}}) => [x, y, width, height])({part}.getBoundingClientRect())")
        for part in (f"document.querySelector('#text-{writer}')" for writer in (MODEL, AGENT))
    )
    assert top == other_top  # side by side, not one below the other
    assert other_left >= left + width > left
    assert other_width == width
    visitor.write(PROMPT, " a b")
    visitor.click("document.querySelector('#start')")
    until(visitor, texts(MODEL), ["a b"])
    assert (
        "token"
        not in visitor.evaluate("document.querySelector('#text-language-model').innerText.toLowerCase()").split()
    )
    visitor.write(PROMPT, " a")
    visitor.press("Enter")
    for writer in (MODEL, AGENT):
        until(visitor, texts(writer), ["a"])
        until(visitor, state(writer), "reward +0.000, KL 0.00 nats")
    # After " a" the language model likes " a" best. The agent wants " b", once; then both like " b".
    choose(visitor, "greedy")
    visitor.click(WRITE_ALL)
    until(visitor, texts(MODEL), ["a"] * 5)
    until(visitor, texts(AGENT), ["a", "b", "b", "b", "b"])
    until(visitor, state(MODEL), "reward +0.000, KL 0.00 nats, ended (length)")
    visitor.wait_for(f"{state(AGENT)}.startsWith('reward +1.000, KL ')")
    # Back by a click on a token, another way from there by a click on a candidate; both stay in the tree.
    visitor.click(f"{tokens(AGENT)}[1]")
    until(visitor, texts(AGENT), ["a", "b"])
    until(visitor, cells(AGENT, 0), ["b", HOSTILE, "a"])
    visitor.click(cell(AGENT, 2))
    until(visitor, texts(AGENT), ["a", "b", "a"])
    until(visitor, cells(AGENT, 0, "tried"), ["a b", "b b b", "a"])
    assert visitor.evaluate(texts(MODEL)) == ["a"] * 5
    for way in ("sample", "particles"):
        choose(visitor, way)
        visitor.click(WRITE_ALL)
        visitor.wait_for(ended(AGENT))
        visitor.wait_for(f"{texts(AGENT)}.length == 5")
        assert visitor.evaluate(texts(AGENT))[:3] == ["a", "b", "a"]
        visitor.click(f"{tokens(AGENT)}[2]")
        until(visitor, texts(AGENT), ["a", "b", "a"])


def test_a_typed_beta_changes_the_policy(open_page):
    visitor = open_page()
    weights = {" a": 5, " b": 2, HOSTILE: 2}  # the table's first row

    def share(beta):  # of " b", which alone gains 1
        tilted = weights[" b"] * math.exp(1 / beta)
        return f"{tilted / (weights[' a'] + weights[HOSTILE] + tilted):.1%}"

    for typed, beta in ((None, 0.1), ("0.75", 0.75), ("7", 1.0), ("0.25", 0.25)):  # 1 is the slider's end
        if typed is not None:
            visitor.write(BETA, typed)
            visitor.press("Enter")
        visitor.wait_for(f"{cell(AGENT, 1, 3)}.innerText.trim().endsWith(' {share(beta)}')")
    assert "Error" not in visitor.shown()


def test_two_visitors_at_once_have_texts_of_their_own(open_page):
    first, second = open_page(), open_page()
    second.write(PROMPT, " b")
    second.press("Enter")
    until(second, texts(MODEL), ["b"])
    first.click(cell(MODEL, 0))
    until(first, texts(MODEL), ["a", "a"])
    second.click(cell(MODEL, 0))
    until(second, texts(MODEL), ["b", "b"])
    for visitor in (first, second):
        choose(visitor, "greedy")
        visitor.click(WRITE_ALL)
    until(first, texts(MODEL), ["a"] * 5)
    until(second, texts(MODEL), ["b"] * 5)
    until(first, cells(MODEL, 0, "tried"), ["a a a a a"])
    until(second, cells(MODEL, 0, "tried"), ["b b b b b"])


def test_hostile_text_is_shown_as_text(open_page, browser):
    visitor = open_page()
    visitor.write(PROMPT, f" {HOSTILE}")
    visitor.press("Enter")
    until(visitor, texts(MODEL), [HOSTILE])  # the prompt
    until(visitor, cells(MODEL, 0), ["a", "b", HOSTILE])
    visitor.click(cell(MODEL, 2))
    until(visitor, texts(MODEL), [HOSTILE, HOSTILE])  # a token
    until(visitor, cells(MODEL, 0, "tried"), [f"{HOSTILE} {HOSTILE}"])
    visitor.write(PROMPT, f"{HOSTILE}?")  # no text of the table: the error says so
    visitor.press("Enter")
    visitor.wait_for("document.body.innerText.includes('no token of model')")
    assert visitor.evaluate("document.querySelectorAll('img[src=x]').length") == 0
    assert browser.dialogs == []
    visitor.evaluate("alert('heard')")  # a dialog would be noticed
    assert browser.dialogs == ["heard"]
