"""Pages, read back by Python's own parser and looked at in a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from graphprune.report.html.compiled import compiled_page
from graphprune.report.html.curve import Mark, chart
from graphprune.report.html.swept import swept_page

EVIL = "<script>document.title = 'broken'</script> & \"quotes\" <img src=x onerror=alert(1)>"
ESTIMATE = {"value": 1.25, "low": 1.1, "high": 1.4}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


def side(scale: float) -> dict:
    losses = [2.0, 2.5]
    text = {"value": 9.5, "length": 32, "windows": 2, "vocabulary": 96, "losses": losses}
    return {
        "parameters": round(1000 * scale),
        "macs": round(5000 * scale),
        "bytes": round(4000 * scale),
        "files": None,
        "perplexities": {EVIL: text},
        "input": "1 x 128 tokens",
        "inputs": {"input_ids": [1, 128]},
        "notes": [],
    }


def timed(seconds: float) -> dict:
    latency = {"seconds": seconds, "quartiles": [0, 1], "repeats": 9, "threads": 1, "macs": 5}
    return {"torch": latency, "onnxruntime": None}


@pytest.fixture
def report() -> dict:
    comparison = {"windows": 2, "length": 32, "tokens": 62, "ratio": ESTIMATE,
                  "agreement": {**ESTIMATE, "value": 0.9}, "kl": None}  # fmt: skip
    names = [f"model.layers.{n}.mlp.down_proj.weight" for n in range(12)]
    speedup = {"torch": {"time": 1.5, "macs": 1.6, "share": 0.94}}
    return {
        "source": f"/models/{EVIL}",
        "before": side(1),
        "after": side(0.75),
        "kept": {"ffn": [96, 192]},
        "structures": [
            {"name": name, "role": "ffn", "layer": str(n), "size": 16, "count": 8}
            for n, name in enumerate(names)
        ],
        "max_abs_error": 1.5e-12,
        "verified_in": "float64",
        "notes": [EVIL],
        "masks": None,
        "refits": {
            "method": "obs",
            "layers": [
                {"parameter": name, "removed": 8, "before": 0.2, "error": 0.1 + n / 100}
                for n, name in enumerate(names)
            ],
        },
        "trained": [
            {
                "method": "recover",
                "told": "trained",
                "figures": {"losses": [3 - n / 1000 for n in range(1000)]},
            }
        ],
        "quality": {
            "texts": {EVIL: comparison},
            "completions": [{"prompt": "Water boils when", "dense": "it is hot", "slim": EVIL}],
        },
        "controls": [{"name": "not trained", "perplexities": {EVIL: 20.0}}],
        "sweep": {
            "rows": [row("params=0.9", 0.9, 1.1), row("params=0.6", 0.6, 3.0)],
            "suggestion": {"label": "params=0.9", "reason": "suggested: params=0.9; the knee"},
        },
        "recipe": f"# {EVIL}\nremove: {{ffn: 0.5}}\n",
        "provenance": {
            "versions": {"torch": "2.13"},
            "seed": 0,
            "source": {"sha256": "ab" * 32},
            "samples": {"refits": {"described": EVIL, "sha256": "cd"}},
        },
        "run": {
            "date": "2026-01-01",
            "command": f"graphprune compile '{EVIL}'",
            "outputs": ["/tmp/out put"],
            "seconds": {"measuring": 1.25},
            "latency": {"before": timed(0.03), "after": timed(0.02), "speedup": speedup},
        },
    }


def row(label: str, kept: float, ratio: float) -> dict:
    return {"label": label, "size": label, "series": "", "parameters": round(1000 * kept),
            "parameters_kept": kept, "macs": 1, "macs_kept": kept, "perplexity_ratio": ratio,
            "ratio_low": ratio - 0.1, "ratio_high": ratio + 0.1, "agreement": 0.8, "kl": None,
            "speedup": None, "error": 0.1}  # fmt: skip


@pytest.fixture
def sweep(report) -> dict:
    points = [
        {"label": one["label"], "row": one, "quality": report["quality"]}
        for one in report["sweep"]["rows"]
    ]
    cells = [
        {"structure": f"s{n}", "role": role, "layer": str(n), "removed": 0.5, "change": 0.1,
         "kl": 0.01 * (n + 1)}
        for n in range(30) for role in ("ffn", "query_heads", EVIL)
    ]  # fmt: skip
    return {
        "source": "/models/small",
        "points": points,
        "suggestion": {"label": None, "reason": EVIL, "recipe": EVIL},
        "sensitivity": cells,
        "notes": [EVIL],
        "run": {"command": EVIL, "seconds": {"measuring": 2.5}},
    }


class Seen(HTMLParser):
    """Elements, what they refer to, and the text."""

    EMPTY = ("meta", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.refers: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.refers += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        assert not [k for k, _ in attrs if k.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def check(page: str) -> Seen:
    """One file: no script, nothing from elsewhere, every element closed."""
    seen = Seen(page)
    assert seen.open == []
    assert not {"script", "img", "iframe", "object"} & set(seen.tags)
    assert seen.refers == ["data:,"]
    assert "url(" not in page
    assert "@import" not in page
    assert len(page.encode()) < 1_000_000
    return seen


def test_a_page_has_all_that_the_report_has(report):
    seen = check(compiled_page(report))
    words = "".join(seen.words)
    for title in (
        "Before and after",
        "Quality by text",
        "The same prompts, continued",
        "Compared with",
        "The curve",
        "What stays",
        "Errors by layer",
        "Training: recover",
        "The proof",
        "The recipe",
        "What it depends on",
    ):
        assert title in words
    for told in ("25.0 %", "1.50×", "1.25×", "1.250 (1.100 to 1.400)", "1.5e-12", "float64",
                 "graphprune verify '/tmp/out put'", "remove: {ffn: 0.5}", "ab" * 32):  # fmt: skip
        assert told in words
    assert words.count(EVIL) >= 8  # as text, wherever it stands
    assert seen.tags.count("rect") == 12 + 2  # a cell for each layer, a bar for each latency


def test_a_page_needs_nothing_that_a_report_may_lack(report):
    bare = {key: report[key] for key in ("source", "before", "after")}
    for one in (bare["before"], bare["after"]):
        one |= {"perplexities": {}, "macs": None}
    check(compiled_page({**bare, "kept": {}, "quality": None, "refits": None, "notes": []}))


def test_the_page_of_a_sweep(sweep):
    seen = check(swept_page(sweep))
    words = "".join(seen.words)
    for title in ("The curve", "Layer by layer", "The same prompts, continued",
                  "The suggested recipe"):  # fmt: skip
        assert title in words
    assert seen.tags.count("rect") == 90


def test_control_characters_show_as_codes(report):
    report["notes"] = ["a\x00b\x1b[31m\u202ec"]
    page = compiled_page(report)
    assert "a\\x00b\\x1b[31m\\u202ec" in page


def test_marks_stand_where_their_values_are():
    """Three points on a line of equal ratios: a straight line on a logarithmic axis."""
    marks = [Mark(0, 1), Mark(1, 2), Mark(2, 4)]
    shown = str(chart({"one": marks}, "x", "y", logarithmic=True))
    places = [tuple(map(float, p.split(","))) for p in re.search(
        r'points="([^"]+)"', shown)[1].split()]  # fmt: skip
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1


@pytest.mark.parametrize("values", [[float("nan")], [], [float("inf")]])
def test_without_points_there_is_no_chart(values):
    assert chart({"one": [Mark(0, v) for v in values]}, "x", "y") == ""


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-9, 1e9, -3.0])
def test_one_point_is_a_chart(value):
    assert "<circle" in chart({"one": [Mark(0.5, value)]}, "x", "y")


@pytest.mark.slow  # a browser starts
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("kind", ["compiled", "swept"])
def test_a_browser_shows_it_without_a_complaint(kind, width, report, sweep, tmp_path):
    page = compiled_page(report) if kind == "compiled" else swept_page(sweep)
    # How wide the document has become is told by a script that only this copy has.
    probe = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    (tmp_path / "page.html").write_text(page.replace("</body>", probe))
    picture = tmp_path / "page.png"
    common = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
              f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
              f"--window-size={width},1600"]  # fmt: skip
    url = (tmp_path / "page.html").as_uri()
    shot = subprocess.run([*common, f"--screenshot={picture}", url], capture_output=True, text=True,
                          check=True, timeout=120)  # fmt: skip
    assert "CONSOLE" not in shot.stderr
    size = struct.unpack(">II", picture.read_bytes()[16:24])
    assert size[0] >= min(width, 500)  # headless windows may have a least width
    dumped = subprocess.run([*common, "--dump-dom", url], capture_output=True, text=True,
                            check=True, timeout=120)  # fmt: skip
    found = int(re.search(r"<title>(\d+)</title>", dumped.stdout)[1])
    assert found <= max(width, 500)  # nothing makes the page scroll sideways


def test_the_page_is_made_of_the_file(report, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report))
    again = json.loads((tmp_path / "report.json").read_text())
    assert compiled_page(again) == compiled_page(report)
    assert isinstance(tmp_path, Path)
