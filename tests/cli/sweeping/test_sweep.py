"""`graphprune sweep` against compilations of the same points, one by one."""

from __future__ import annotations

import csv
import json

import pytest
import yaml

from cli.helpers import check_failure
from graphprune.passes.repair import together
from graphprune.passes.scores.flap import Flap
from graphprune.pipeline.compiler import compile
from graphprune.sweep import sharing, sweep


@pytest.fixture
def small(tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text("calibration: {windows: 8, length: 32}\nremove: {ffn: 0.5}\n")
    return recipe


def test_a_sweep_has_a_table_a_result_and_a_recipe(run, taught, cycles, small, tmp_path):
    out = tmp_path / "sweep"
    result = run("sweep", taught, small, "-o", out, "--data", cycles, "--remove", "ffn=25%,50%,75%")
    assert result.code == 0, result.err
    assert "suggested: ffn=" in result.out
    data = json.loads((out / "sweep.json").read_text())
    sizes = [one["after"]["parameters"] for one in data["points"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    assert [one["kept"]["ffn"] for one in data["points"]] == [[144, 192], [96, 192], [48, 192]]
    assert all(one["shared"] for one in data["points"])
    assert all(one["max_abs_error"] < 1e-6 for one in data["points"])
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [row["size"] for row in rows] == ["ffn=25%", "ffn=50%", "ffn=75%"]
    worst = max(t["ratio"]["value"] for t in data["points"][0]["quality"]["texts"].values())
    assert float(rows[0]["perplexity_ratio"]) == pytest.approx(worst)
    chosen = next(one for one in data["points"] if one["label"] == data["suggestion"]["label"])
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe == yaml.safe_load(chosen["recipe"])
    assert recipe["score"] == "obs"
    assert recipe["calibration"]["data"] == str(cycles)


def test_what_is_suggested_compiles(run, taught, cycles, small, tmp_path):
    out, slim = tmp_path / "sweep", tmp_path / "slim"
    flags = ("--data", cycles, "--remove", "ffn=25%,50%")
    assert run("sweep", taught, small, "-o", out, *flags).code == 0
    result = run("compile", taught, out / "recipe.yaml", "-o", slim)
    assert result.code == 0, result.err
    data = json.loads((out / "sweep.json").read_text())
    chosen = next(one for one in data["points"] if one["label"] == data["suggestion"]["label"])
    report = json.loads((slim / "report.json").read_text())
    assert report["kept"] == chosen["kept"]
    assert report["after"]["parameters"] == chosen["after"]["parameters"]
    assert report["sweep"]["suggestion"]["label"] == chosen["label"]
    for folder in (slim, out):  # pages are made of the data alone
        page = (folder / "report.html").read_text()
        assert "The curve" in page
        (folder / "report.html").unlink()
        assert run("report", folder).code == 0
        assert (folder / "report.html").read_text() == page
    (slim / "report.json").write_text("{}")
    check_failure(run("report", slim), "lacks what a page needs")
    check_failure(run("report", tmp_path), "the report can't be read")


def test_scores_give_what_compilations_of_each_point_give(run, taught, cycles, small, tmp_path):
    """Ranked by a score of the dense model, a point is exactly what compile makes of it."""
    out = tmp_path / "sweep"
    flags = ("--data", cycles, "--remove", "ffn=25%,50%", "--score", "flap,magnitude")
    assert run("sweep", taught, small, "-o", out, *flags, "--repair", "none").code == 0
    data = json.loads((out / "sweep.json").read_text())
    assert [one["label"] for one in data["points"]] == [
        "score flap, ffn=25%",
        "score flap, ffn=50%",
        "score magnitude, ffn=25%",
        "score magnitude, ffn=50%",
    ]
    for one in (data["points"][1], data["points"][2]):
        report = compile(taught, yaml.safe_load(one["recipe"]), tmp_path / one["label"])
        measured = one["after"]["perplexities"]
        both = measured.keys() & report.after.perplexities.keys()
        assert "builtin" in both  # what reads no data is measured on other texts by itself
        for text in both:
            found = report.after.perplexities[text].value
            assert found == pytest.approx(measured[text]["value"], rel=1e-4)


def test_the_dense_model_is_looked_at_once(run, taught, cycles, small, tmp_path, monkeypatch):
    streamed, scored, read = [], [], []
    monkeypatch.setattr(sharing, "obs_together", lambda *a, **k: streamed.append(len(a[2]))
                        or together.obs_together(*a, **k))  # fmt: skip
    score = Flap.score
    monkeypatch.setattr(Flap, "score", lambda *a: scored.append(1) or score(*a))
    opened = sweep.open_source
    monkeypatch.setattr(sweep, "open_source", lambda *a: read.append(1) or opened(*a))
    flags = ("--data", cycles, "--remove", "ffn=25%,50%,75%", "--score", "obs,flap")
    result = run("sweep", taught, small, "-o", tmp_path / "sweep", *flags)
    assert result.code == 0, result.err
    assert (streamed, scored, read) == ([3], [1], [1])


def test_each_structure_alone(run, taught, cycles, small, tmp_path):
    out = tmp_path / "sweep"
    flags = ("--data", cycles, "--remove", "ffn=25%,50%", "--by-layer")
    result = run("sweep", taught, small, "-o", out, *flags)
    assert result.code == 0, result.err
    cells = json.loads((out / "sweep.json").read_text())["sensitivity"]
    assert [(one["role"], one["layer"], one["removed"]) for one in cells] == [
        ("ffn", str(layer), 0.5) for layer in range(3)
    ]
    assert all(one["kl"] > 0 for one in cells)
    assert "each alone (KL in nats)" in result.out


def test_it_goes_on_where_it_stopped(run, taught, cycles, small, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    flags = ("--data", cycles, "--remove", "ffn=25%,50%")
    measure = sweep.measure

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "measure", stop)
    assert run("sweep", taught, small, "-o", out, *flags).code == 130
    monkeypatch.setattr(sweep, "measure", measure)
    assert not out.exists()
    left = tmp_path / ".sweep.state"
    assert left.is_dir()
    check_failure(run("sweep", taught, small, "-o", out, *flags), "interrupted sweep", "--resume")
    other = ("--data", cycles, "--remove", "ffn=25%,75%")
    check_failure(
        run("sweep", taught, small, "-o", out, *other, "--resume"), "sweep was another one"
    )
    chosen = []
    choose = together.Together._choose
    monkeypatch.setattr(together.Together, "_choose", lambda *a: chosen.append(a[1]) or choose(*a))
    result = run("sweep", taught, small, "-o", out, *flags, "--resume")
    assert result.code == 0, result.err
    assert chosen == []  # all layers were done
    assert (out / "sweep.json").is_file()
    assert not left.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target", "params=0.9", "--remove", "ffn=0.5"), "varies one goal"),
        (("--remove", "fnn=0.1,0.2"), "unknown role 'fnn'"),
        (("--target", "params=0.9,0.001"), "ask for 12,288 or more"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(run, taught, cycles, tmp_path, flags, message):
    check_failure(run("sweep", taught, "-o", tmp_path / "out", "--data", cycles, *flags), message)
    assert not list(tmp_path.iterdir())


def test_only_a_sweep_is_replaced(run, taught, tmp_path):
    (tmp_path / "mine").write_text("1")
    flags = ("--remove", "ffn=0.1,0.2")
    check_failure(run("sweep", taught, "-o", tmp_path, *flags), "the output exists")
    check_failure(run("sweep", taught, "-o", tmp_path, *flags, "--overwrite"), "no sweep")
