"""The playground: what it shows of a job, and who may enter."""

from __future__ import annotations

import base64
import html
import json
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from shoulders.cli.serve import loopback
from shoulders.serving import mount
from shoulders.serving.views import candidate_rows, details_html, heat_html, shades
from shoulders.skills.attended import Attended

EVIL = "<script>alert(1)</script>"
FOUND = [
    {"id": "b", "title": "France", "text": f"Paris. {EVIL}", "retrieved": 3,
     "retrieved_score": 1.5, "ranked": 1, "score": 0.75, "read": "whole"},
    {"id": "a", "title": "", "text": "Rome is old.", "retrieved": 1,
     "retrieved_score": None, "ranked": 2, "score": 0.125, "read": None},
]  # fmt: skip
CANDIDATES = [
    {"text": "cold", "count": 3, "logprob": -0.25, "shown": True},
    {"text": EVIL, "count": 1, "logprob": -2.0, "shown": False},
]


def test_passages_are_shown_with_both_orders_and_escaped() -> None:
    page = details_html({"found": FOUND, "read": [f"Paris. {EVIL}\n\nQuestion: q"]}, "Paris")
    for said in ("2 found, 1 read", "0.750", "1.50", "0.125", "France", "Rome is old."):
        assert said in page, said
    assert EVIL not in page
    assert html.escape(EVIL) in page
    assert page.count('class="sh-read"') == 1
    assert "What the last pass read" in page


def test_the_choice_is_marked_among_candidates() -> None:
    details = {"candidates": CANDIDATES, "chooser": "second_pass", "read": ["x", "y"]}
    assert [row["chosen"] for row in candidate_rows(details, " cold \nand more")] == [True, False]
    assert not any(row["chosen"] for row in candidate_rows(details, "of its own"))
    page = details_html(details, "cold")
    assert "no room" in page
    assert EVIL not in page
    assert "The second pass read the candidates" in page
    assert "an earlier pass read" in page
    assert "most frequent" in details_html({**details, "chooser": "majority"}, "cold")


def test_no_details_show_nothing() -> None:
    assert details_html({}, "answer") == ""
    assert heat_html([]) == ""


def test_a_heat_map_has_a_cell_for_each_weight() -> None:
    weights = np.array([[0.1, 0.4, 0.5], [0.8, 0.2, 0.0]], dtype=np.float32)
    one = Attended(1, ("[CLS]", " hot\n", EVIL), weights)
    page = heat_html([one])
    assert page.count("<td") == 6
    assert "the 2 prompt positions" in page
    assert "darkest cell is 0.80" in page
    assert '--w:1.00" title="0.800"' in page
    assert "·hot⏎" in page
    assert EVIL not in page
    assert "of pass" not in page
    assert "of pass 2" in heat_html([one, Attended(2, ("a",), np.ones((1, 1)))])


def test_shades_are_relative_to_the_largest() -> None:
    assert shades([[0.25, 0.5], [0.0, 0.125]]) == [[(0.25, 0.5), (0.5, 1)], [(0, 0), (0.125, 0.25)]]
    assert shades([[0.0]]) == [[(0.0, 0.0)]]


def request(headers: dict[str, str], method: str = "GET", path: str = "/playground/") -> Request:
    raw = [(k.encode(), v.encode("latin-1")) for k, v in headers.items()]
    return Request({"type": "http", "method": method, "path": path, "headers": raw,
                    "query_string": b"", "server": ("x", 80), "scheme": "http"})  # fmt: skip


def basic(text: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize(
    ("headers", "enters"),
    [
        ({}, False),
        (basic("me:key"), True),
        (basic(":key"), True),
        (basic("me:kéy"), False),
        (basic("key"), False),
        (basic("key:"), False),
        ({"authorization": "Basic ä"}, False),
        ({"authorization": "Bearer key"}, True),
        ({"authorization": "Bearer key2"}, False),
        ({"authorization": "key"}, False),
    ],
)
def test_a_key_opens_the_door(headers: dict[str, str], enters: bool) -> None:
    refused = mount.refusal(request(headers), "key")
    assert (refused is None) == enters
    if refused is not None:
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
    assert mount.refusal(request(headers), None) is None


def test_a_key_may_hold_letters_of_any_language() -> None:
    came = "Bearer " + "schlüssel €".encode().decode("latin-1")  # as bytes of headers are read
    for headers in (basic("me:schlüssel €"), {"authorization": came}):
        assert mount.refusal(request(headers), "schlüssel €") is None
        assert mount.refusal(request(headers), "schlussel €") is not None


def test_other_sites_and_files_stay_out() -> None:
    for site, enters in (("cross-site", False), ("same-site", False), ("same-origin", True)):
        own = {"sec-fetch-site": site}
        assert (mount.refusal(request(own, "POST"), None) is None) == enters
        assert mount.refusal(request(own), None) is None, "a link may lead here"
    refused = mount.refusal(request({}, "POST", "/playground/gradio_api/upload"), None)
    assert refused is not None
    assert refused.status_code == 404


def served(server: Any = None) -> TestClient:
    app = FastAPI()

    @app.post("/v1/thing")
    def thing() -> dict[str, str]:
        return {}

    mount.add_playground(app, server, lambda: True)
    return TestClient(app)


def test_without_gradio_the_page_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount.importlib.util, "find_spec", lambda _: None)
    found = served().get("/")
    assert found.status_code == 200
    assert "pip install -e '.[playground]'" in found.text
    assert served().get("/playground/").status_code == 404


def test_the_api_and_its_description_stay_as_they_are() -> None:
    pytest.importorskip("gradio")
    client = served()
    assert list(json.loads(client.get("/openapi.json").text)["paths"]) == ["/v1/thing"]
    assert client.get("/v1/thing").status_code == 405
    assert client.get("/nothing").status_code == 404
    home = client.get("/", follow_redirects=False)
    assert (home.status_code, home.headers["location"]) == (307, "./playground/")


def test_loopback_is_this_machine_alone() -> None:
    assert all(map(loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))
