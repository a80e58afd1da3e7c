"""The report: what it says, in which order, that it stands alone, and that no text of a model can do anything in it."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from harness.config.arms import title
from harness.decide import words
from harness.decide.recommend import recommendation_line
from harness.decide.study import decide_study
from harness.report import facts
from harness.report import page as report
from harness.report.__main__ import main
from harness.report.facts import cost_table, phrase
from harness.report.prompts import side_by_side
from harness.report.study import read_study
from harness.report.style import looks
from harness.report.summary import summarise, warnings
from harness.report.tables import build, degenerate_table, score_table, trial_table
from harness.study.files import read_json, read_jsonl, write_json, write_jsonl, write_text
from harness.study.text import fence, html, markdown, one_line, visible
from tests.study_fixture import ARMS, LABELS, build_study

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A whole study with a warning; `page` is its report."""
    folder = build_study(tmp_path_factory.mktemp("results") / "letters")
    change(folder / "verdict.json", warnings=["beta=0.1 lies on the edge of its grid"])
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "letters"))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A study of 6 prompts whose report is quickly drawn."""
    return build_study(tmp_path_factory.mktemp("few") / "letters", prompts=6, bare=True)


@pytest.fixture
def target(few, tmp_path):
    return Path(shutil.copytree(few, tmp_path / "letters"))


@pytest.fixture(scope="module")
def page(built):
    return Page(report.render_report(built).read_text(encoding="utf-8"))


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, and its text."""

    VOID = frozenset({"meta", "br", "hr", "input"})

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.source, self.elements, self.texts, self.scripts, self.open = source, [], [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())


def rendered(folder):
    path = report.render_report(folder)
    return Page(path.read_text(encoding="utf-8")), (folder / "report.md").read_text(encoding="utf-8")


def change(path, **values):
    write_json(path, read_json(path) | values)


def manifests(folder, arm):
    return [p for p in sorted(folder.glob("trials/*/manifest.json")) if read_json(p)["arm"] == arm]


# What the report says, and where


def test_the_verdict_comes_first_and_the_sections_follow_in_order(built, page):
    text = (built / "report.md").read_text(encoding="utf-8")
    ids = [attrs["id"] for tag, attrs in page.elements if tag == "section" and "id" in attrs]
    assert ids == [
        "verdict",
        "interval-section",
        "warnings",
        "claims",
        "scores",
        "learning",
        "lengths",
        "completions",
        "costs",
        "identity",
        "provenance",
        "trials",
        "reproduce",
    ]
    reason = read_json(built / "verdict.json")["reason"]
    ship = recommendation_line(read_json(built / "verdict.json"))
    assert ship.startswith("Ship SimPO. SimPO beats DPO by ")
    assert page.text.index(ship) < page.text.index(reason) < page.text.index("Method level")
    assert text.startswith("# SimPO beats DPO\n\n**Ship SimPO. SimPO beats DPO by ")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == [
        "Warnings: 1",
        "Claims",
        "Scores",
        "Learning curves",
        "Lengths",
        "Side by side",
        "Costs",
        "Data identity",
        "Data and provenance",
        "Trials",
        "How to reproduce",
    ]


def test_one_seed_is_a_verdict_on_checkpoints_and_never_on_the_method(target):
    why = "This SimPO checkpoint beats this DPO checkpoint by 12.0 points."
    told = {"ship": "simpo", "why": why, "next": "Train each arm with at least 3 seeds."}
    change(target / "verdict.json", level="checkpoint", recommendation=told)
    page, text = rendered(target)
    for shown in (page.text, text):
        assert "This SimPO checkpoint beats this DPO checkpoint" in shown
        assert "does not say which method is better" in shown
        assert "SimPO beats DPO" not in shown


@pytest.mark.parametrize(
    ("values", "headline"),
    [
        ({"verdict": "dpo"}, "DPO beats SimPO"),
        ({"verdict": "tie"}, "Tie"),
        ({"verdict": "inconclusive"}, "Inconclusive: not enough evidence"),
        ({"verdict": "trade-off", "difference": -0.1}, "Trade-off: DPO scores better and fails a guard"),
        ({"verdict": "simpo", "level": "checkpoint"}, "This SimPO checkpoint beats this DPO checkpoint"),
        ({"verdict": "simpo", "level": "config"}, "This SimPO config beats this DPO config"),
    ],
    ids=["winner", "tie", "inconclusive", "trade_off", "checkpoint", "config"],
)
def test_every_verdict_has_a_headline(target, values, headline):
    change(target / "verdict.json", **values)
    assert summarise(read_study(target)).headline == headline


def test_the_recommendation_and_what_stands_beside_it_are_on_the_first_screen(target):
    change(target / "verdict.json", caveats=["golden was looked at 2 times"])
    page, text = rendered(target)
    for shown in (page.text, text):
        assert shown.index("Ship SimPO.") < shown.index("golden was looked at 2 times") < shown.index("Method level")


@pytest.mark.parametrize("recommendation", [None, {}, {"ship": 3, "why": None}, "simpo"])
def test_a_verdict_without_a_recommendation_says_how_to_get_one(target, recommendation):
    change(target / "verdict.json", recommendation=recommendation)
    page, _ = rendered(target)
    if recommendation == {"ship": 3, "why": None}:
        assert "Ship 3." in page.text
    else:
        assert "No recommendation: this verdict was made before there were any." in page.text


def test_a_study_of_three_arms_shows_its_ranking(target):
    pairs = [
        {"arms": ["simpo", "dpo"], "difference": 0.1, "ci95": [0.02, 0.18], "verdict": "simpo", "alpha": 0.05},
        {"arms": ["simpo", "dpo_norm"], "difference": 0.01, "ci95": [-0.07, 0.09], "verdict": "tie", "alpha": 0.025},
        {
            "arms": ["dpo", "dpo_norm"],
            "difference": -0.1,
            "ci95": [-0.2, 0.0],
            "verdict": "inconclusive",
            "alpha": 0.05,
        },
    ]
    change(target / "verdict.json", pairs=pairs, best_set=["simpo", "dpo_norm"])
    page, text = rendered(target)
    for shown in (page.text, text):
        assert "Ranking: all pairs of arms" in shown
        assert "SimPO wins" in shown
        assert f"Arms that no arm beats: SimPO and {title('dpo_norm')}." in shown


def test_the_scores_are_those_of_the_files_in_percent_with_the_spread_over_seeds(folder):
    """Three runs of DPO with 1, 2 and 3 of 4 prompts right: mean 50%, SD 25 points."""
    frame = pd.read_csv(folder / "scores.csv", keep_default_na=False)
    frame = frame[(frame["split"] == "golden") & (frame["scorer"] == "checks")]
    frame = frame.groupby(["arm", "seed"]).head(4).copy()
    for arm, seed, right in (("dpo", 0, 1), ("dpo", 1, 2), ("dpo", 2, 3), ("sft", 0, 1)):
        frame.loc[(frame["arm"] == arm) & (frame["seed"] == seed), "score"] = [1.0] * right + [0.0] * (4 - right)
    frame.to_csv(folder / "scores.csv", index=False)
    table = score_table(read_study(folder)).frame
    assert table.loc["All checks passed (decides)", "dpo"].startswith("50.0% (")
    assert table.loc["All checks passed (decides)", "sft"].startswith("25.0% (")
    assert table.loc["Standard deviation over seeds, points"].to_dict() == {"sft": "–", "simpo": ANY, "dpo": "25.0"}
    assert table.loc["Seeds"].to_dict() == {"sft": "1", "simpo": "3", "dpo": "3"}


def test_degenerate_output_is_counted_over_all_seeds(folder):
    for path in manifests(folder, "dpo"):
        rows = list(read_jsonl(path.parent / "completions.jsonl"))
        for number, row in enumerate(rows):
            row["flags"] = ["empty"] if number < 3 else ["cut_off", "repetition"] if number == 3 else []
            row["completion"] = "same" if number < 45 else str(number)
        write_jsonl(path.parent / "completions.jsonl", rows)
    table = degenerate_table(read_study(folder)).frame
    assert table["dpo"].to_dict() == {
        "Completions": "180",
        "Empty": "9 (5.0%)",
        "Cut off at the token limit": "3 (1.7%)",
        "Repetition": "3 (1.7%)",
        "Most frequent answer of a run": "75.0%",
    }


def test_unscored_prompts_are_counted_with_their_reason_and_not_as_zero(folder):
    frame = pd.read_csv(folder / "scores.csv", keep_default_na=False)
    rows = (frame["arm"] == "dpo") & (frame["scorer"] == "checks") & (frame["split"] == "golden")
    first = frame.index[rows][:4]
    frame["score"] = frame["score"].astype(object)
    frame.loc[frame.index[rows], "score"] = 1.0
    frame.loc[first, ["score", "unscored_reason"]] = ["", "judge timed out"]
    frame.to_csv(folder / "scores.csv", index=False)
    table = score_table(read_study(folder)).frame
    assert table.loc["All checks passed (decides)", "dpo"].startswith("100.0% (")
    assert table.loc["Unscored (not counted as 0)", "dpo"] == "4 prompts: judge timed out"


def test_costs_are_compared_on_one_engine_with_their_ratio(folder):
    for arm, train in (("simpo", (4.0, 5.0, 6.0)), ("dpo", (9.0, 10.0, 11.0))):
        for path, seconds in zip(manifests(folder, arm), train, strict=True):
            change(
                path,
                seconds={"train": seconds, "load": 1.0, "score": 0.01},
                peak_memory_bytes={"train": 2**30},
                tokens={"train": 1000},
            )
    table = cost_table(read_study(folder)).frame
    assert table.loc["Seconds: train"].to_dict() == {"simpo": "5.0", "dpo": "10.0", "SimPO / DPO": "0.50×"}
    assert table.loc["Seconds: score"].to_dict() == {"simpo": "0.0", "dpo": "0.0", "SimPO / DPO": "–"}
    assert table.loc["Seconds in all"].to_dict() == {"simpo": "6.0", "dpo": "11.0", "SimPO / DPO": "0.55×"}
    assert table.loc["Peak memory of training (GiB)", "dpo"] == "1.00"
    # 1000 tokens in 5 s on average; the mean of 1000/4, 1000/5 and 1000/6 would be 206.
    assert table.loc["Tokens trained on per second"].to_dict() == {"simpo": "200", "dpo": "100", "SimPO / DPO": "2.00×"}


def test_costs_of_different_engines_are_not_compared(folder):
    for path in manifests(folder, "dpo"):
        change(path, engine="stock")
    table = cost_table(read_study(folder))
    assert "SimPO / DPO" not in table.frame
    assert any("different engines (SimPO: paired; DPO: stock)" in note for note in table.notes)
    change(manifests(folder, "dpo")[0], engine="paired")
    table = cost_table(read_study(folder))
    assert table.frame.loc["Seeds"].to_dict() == {"simpo": "3", "dpo": "1", "SimPO / DPO": "–"}
    assert any("Only trials with the engine “paired”" in note for note in table.notes)


def test_identical_data_is_proved_only_by_equal_hashes(target):
    page, text = rendered(target)
    assert "Identical data: proved." in page.text
    change(manifests(target, "dpo")[1], consumed_tokens_sha256="f" * 64)
    page, text = rendered(target)
    for shown in (page.text, text):
        assert "Identical data: NOT proved." in shown
        assert "Identical data: proved" not in shown
        assert "ffffffffffffffff ≠ its batch plan" in shown
    assert "identical data is NOT proved" in page.text[: page.text.index("Scores on the golden set")], (
        "it is a warning, too"
    )


def test_golden_pairs_alone_are_called_ranking_and_a_disagreement_is_a_warning(tmp_path):
    folder = build_study(tmp_path / "pairs", prompts=6, metric="preference_accuracy", bare=True)
    frame = pd.read_csv(folder / "scores.csv", keep_default_na=False)
    for scorer, arm, score in (
        ("sum", "dpo", 0.9),
        ("sum", "simpo", 0.6),
        ("mean", "dpo", 0.5),
        ("mean", "simpo", 0.7),
    ):
        frame.loc[(frame["scorer"] == f"preference_accuracy_{scorer}") & (frame["arm"] == arm), "score"] = score
    frame.to_csv(folder / "scores.csv", index=False)
    page, text = rendered(folder)
    for shown in (page.text, text):
        assert "ranking two given answers is not the same as answering well" in shown
        assert "by DPO's reward DPO is ahead by 30.0 points, by SimPO's reward SimPO is ahead by 20.0 points." in shown
    frame.loc[frame["scorer"] == "preference_accuracy_sum", "score"] = frame["score"].where(frame["arm"] == "dpo", 0.95)
    frame.to_csv(folder / "scores.csv", index=False)
    assert not any("disagree" in warning for warning in warnings(read_study(folder), {}))


def test_a_study_with_checks_says_nothing_of_ranking(page):
    assert "ranking two given answers" not in page.text


def test_completions_are_sorted_by_disagreement_and_their_number_is_said(folder):
    shown = side_by_side(read_study(folder))
    assert len(shown.comparisons) == 60
    assert len(shown.first) == 40
    scores = [[float(a.score.rstrip("%")) for a in c.answers if a.arm != "sft"] for c in shown.comparisons]
    gaps = [abs(first - second) for first, second in scores]
    assert gaps == sorted(gaps, reverse=True)
    assert (gaps[0], gaps[-1]) == (100, 0)
    ahead = [gap[0] > gap[1] for gap in scores].count(True)
    assert shown.summary.startswith("All 60 prompts of the golden set")
    assert f"SimPO scores higher on {ahead}, DPO on {[g[0] < g[1] for g in scores].count(True)}" in shown.summary
    assert [answer.arm for answer in shown.comparisons[0].answers] == ["sft", *ARMS]


def test_warnings_of_verdict_study_and_trials_are_shown_once_each(target):
    change(target / "verdict.json", warnings=["from the verdict"])
    for path in manifests(target, "dpo"):
        change(path, warnings=["from the trials"], flags=["collapsed"])
    text = (target / "study.yaml").read_text()
    write_text(target / "study.yaml", text + "warnings: [from the study]\n")
    page, _ = rendered(target)
    top = page.text[: page.text.index("Scores on the golden set")]
    assert "4 warnings" in top
    assert "from the verdict" in top
    assert "from the study" in top
    assert top.count("from the trials") == 1
    assert "from the trials (DPO seed 1, DPO seed 2, DPO seed 0)" in top or "from the trials (DPO seed" in top
    assert "the policy collapsed" in top


def test_a_verdict_of_other_scores_is_found_out(target):
    frame = pd.read_csv(target / "scores.csv", keep_default_na=False)
    frame.loc[(frame["arm"] == "dpo") & (frame["scorer"] == "checks"), "score"] = 1.0
    frame.to_csv(target / "scores.csv", index=False)
    page, _ = rendered(target)
    assert "verdict.json is not of these scores" in page.text
    assert "the scores have 100.0%" in page.text


def test_the_command_and_the_provenance_are_there(page):
    assert "python -m harness.sweep +method=simpo,dpo seed=0,1,2" in page.text
    for fact in (
        "trl: 1.16.0",
        "memory: 24.0 GiB",
        "train: longer than data.max_length: 3; dev: none; golden: none",
        "All trials: 6 of 6 complete",
    ):
        assert fact in page.text


def test_the_verdict_of_decide_is_shown_with_its_guard_and_belongs_to_the_scores(target):
    text = (
        (target / "study.yaml").read_text().replace("guards: []", "guards: [{metric: checks_fraction, margin: 0.02}]")
    )
    write_text(target / "study.yaml", text.replace("alpha: 0.05", "alpha: 0.01"))
    decided = decide_study(target)
    page, source = rendered(target)
    assert decided["reason"] in page.text
    assert f"99% interval{words.interval(decided['ci95'])}" in page.text.replace("interval ", "interval")
    bound = words.points(decided["guards"][0]["lower_bound"])
    assert (
        f"| checks\\_fraction | FAILED | SimPO | {words.points(decided['guards'][0]['difference'])} | {bound} | −2.0 |"
        in source
    )
    assert "verdict.json is not of these scores" not in page.text
    assert "NOT proved" not in page.text


def test_an_interval_is_called_by_its_own_confidence_wherever_it_is_shown(target):
    """A study with three registered looks decides each at alpha / 3."""
    verdict = read_json(target / "verdict.json") | {"alpha": 0.05 / 3}
    write_json(target / "verdict.json", verdict)
    page, _ = rendered(target)
    figure = next(path for path in (target / "figures").glob("*.svg") if "points (98.3%:" in path.read_text())
    assert "95%" not in figure.read_text()
    assert f"98.3% {words.interval(verdict['ci95'])}: simpo" in page.text
    assert "98.3333%" not in page.text
    assert any("98.3% interval" in line for line in words.table_lines(verdict))


# What is missing is shown as missing


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        (["verdict.json"], "No verdict yet"),
        (["base"], "No SFT base is stored in this study"),
        (["scores.csv", "trials/*/scores.jsonl", "base/scores.jsonl"], "No scores are stored yet."),
        (["trials", "verdict.json", "scores.csv"], "No trial has been run in this study."),
        (["study.yaml"], "study.yaml names no command."),
        ([], "No training log is stored in this study."),
        (["trials/*/completions.jsonl", "base/completions.jsonl"], "No completions are stored in this study."),
        (["trials"], "No trial has been run in this study."),
        (["trials/*/manifest.json"], "is unfinished and has no scores"),
        (["trials", "base", "scores.csv", "verdict.json"], "No scores are stored yet."),
        (["study.yaml", "trials", "base", "scores.csv"], "No scores are stored yet."),
    ],
)
def test_a_missing_piece_is_said_and_stops_nothing(target, missing, sentence):
    for pattern in missing:
        for path in sorted(target.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page, text = rendered(target)
    assert sentence in page.text
    assert sentence in text.replace("\\", "")
    for drawing in (target / "figures").glob("*.svg"):
        assert f"figures/{drawing.name}" in text
    for name in re.findall(r"\((figures/.*?)\)", text):
        assert (target / name).is_file()


@pytest.mark.parametrize("shift", range(6))
def test_a_verdict_with_odd_values_stops_nothing(target, shift):
    """Six odd values go round over the keys, so that each key has each of them once."""
    odd = [None, [], {}, "text", 3, [None, None]]
    keys = (
        "arms",
        "difference",
        "ci95",
        "ci90",
        "margin",
        "n_seeds",
        "guards",
        "warnings",
        "reason",
        "level",
        "means",
        "n_unscored",
    )
    values = {key: odd[(place + shift) % len(odd)] for place, key in enumerate(keys)}
    change(target / "verdict.json", **values)
    rendered(target)


@pytest.mark.parametrize("value", [None, [], {}, "text", 3])
def test_a_manifest_with_odd_values_stops_nothing(target, value):
    path = manifests(target, "dpo")[0]
    sound = read_json(path)
    for odd in (
        dict.fromkeys(sound.keys() - {"arm", "config", "seed", "status"}, value),
        {"config": value, "seed": value},
    ):
        write_json(path, sound | odd)
        study = read_study(target)
        identity = facts.identity_of(study)
        assert facts.identity_sentence(identity).startswith("Identical data: NOT proved")
        assert warnings(study, identity)
        for table in (cost_table(study), trial_table(study), facts.identity_table(study)):
            assert table.html(looks(study.arms))
        assert facts.facts(study)["Model"] == "embedded"


def test_a_failed_trial_is_listed_with_its_error(target):
    failed = manifests(target, "dpo")[0]
    about = {
        "arm": "dpo",
        "config": LABELS["dpo"],
        "seed": 7,
        "stage": "train",
        "error": "MemoryError",
        "message": "cannot allocate 3 GiB",
    }
    write_json(failed.parent / "failure.json", about)
    failed.unlink()
    page, text = rendered(target)
    for shown in (page.text, text):
        assert "Failed trials" in shown
        assert "MemoryError: cannot allocate 3 GiB" in shown
    assert f"Trial {failed.parent.name} (DPO, seed 7) failed and has no scores" in page.text


def test_a_curve_that_ends_in_nan_is_drawn_as_far_as_it_goes_and_its_figure_goes_with_it(built, target):
    log = manifests(target, "dpo")[0].parent / "train.jsonl"
    rows = list(read_jsonl(built / log.relative_to(target)))
    write_jsonl(log, [*rows[:5], rows[5] | {"loss": None, "grad_norm": None}])
    report.render_report(target)
    assert "nan" not in (target / "figures" / "learning-dpo.svg").read_text().lower()
    log.unlink()
    report.render_report(target)
    assert sorted(path.stem for path in (target / "figures").iterdir()) == ["interval", "prompts"]


# The page stands alone


def test_the_page_allows_its_own_script_by_its_hash_and_no_other(page):
    (data, script) = page.scripts
    kinds = [attrs.get("type") for tag, attrs in page.elements if tag == "script"]
    assert kinds == ["application/json", None]
    assert len(json.loads(data)["rows"]) == 60
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}';" in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp", script)


def test_the_page_needs_no_network(page):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "img", "iframe", "object", "embed", "form", "base", "image"}
    for tag, attrs in page.elements:
        for key, value in attrs.items():
            assert not key.startswith("on")
            assert key not in ("src", "srcset", "action", "formaction", "ping", "background")
            if key == "href":
                assert value.startswith("#"), (tag, value)
            assert "://" not in (value or ""), (tag, key, value)
            assert not re.search(r"url\((?!#)", value or ""), (tag, key, value)
    assert "@import" not in page.source
    policy = next(
        attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none';")
    assert page.open == []


def test_ids_are_unique_and_references_resolve(page):
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = set()
    for _, attrs in page.elements:
        if attrs.get("href"):
            used.add(attrs["href"][1:])
        for key in ("aria-labelledby", "aria-describedby"):
            used |= set((attrs.get(key) or "").split())
        for value in attrs.values():
            used |= set(re.findall(r"url\(#(.*?)\)", value or ""))
    assert used <= set(ids)
    assert len(used) > 10


def test_figures_say_their_numbers_to_those_who_do_not_see_them(built, page):
    figures = [attrs for tag, attrs in page.elements if tag == "svg"]
    assert [attrs["role"] for attrs in figures] == ["img"] * 6
    verdict = read_json(built / "verdict.json")
    root = ET.parse(built / "figures" / "interval.svg").getroot()
    said = root.find(f"{SVG}desc").text
    assert f"SimPO minus DPO: {100 * verdict['difference']:+.1f} points" in said
    for mean in verdict["run_means"]["dpo"].values():
        assert f"{100 * mean:.1f}%" in said
    assert f"{said}" in page.text
    lengths = ET.parse(built / "figures" / "lengths.svg").getroot().find(f"{SVG}desc").text
    assert re.search(r"SFT base: mean \d+\.\d, median \d+, from 5 to \d+ tokens", lengths)


def test_tables_have_headers_with_a_scope(page):
    heads = [attrs for tag, attrs in page.elements if tag == "th"]
    assert len(heads) > 40
    assert {attrs.get("scope") for attrs in heads} == {"col", "row"}
    assert sum(tag == "caption" for tag, _ in page.elements) == sum(tag == "table" for tag, _ in page.elements) == 10


def test_losses_of_the_arms_never_share_an_axis(built):
    for arm, other in (("simpo", "DPO"), ("dpo", "SimPO")):
        texts = [
            "".join(e.itertext())
            for e in ET.parse(built / "figures" / f"learning-{arm}.svg").getroot().iter(f"{SVG}text")
        ]
        assert sum("loss" in text for text in texts) == 1
        assert not any(text.split()[:1] == [other] for text in texts)


def test_an_arm_has_its_colour_and_marker_everywhere(built, page):
    styles = looks(ARMS)
    for arm, names in (
        ("simpo", ("interval", "lengths", "learning-simpo")),
        ("dpo", ("interval", "lengths", "learning-dpo")),
    ):
        for name in names:
            text = (built / "figures" / f"{name}.svg").read_text()
            assert styles[arm].light in text
            assert f"{styles[arm].glyph} " in text
        assert (
            styles[arm].light
            not in (built / "figures" / f"learning-{'dpo' if arm == 'simpo' else 'simpo'}.svg").read_text()
        )
        assert f"var(--arm-{arm})" in page.source
    assert (
        len({(look.light, look.marker, look.dash) for look in styles.values()})
        == len({look.marker for look in styles.values()})
        == 3
    )


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("arm", ["simpo", "dpo", "dpo_norm", "sft", "other", "zeta"])
def test_colours_can_be_read_on_both_papers(arm):
    """WCAG 2.2, 1.4.3: 4.5:1 for text."""
    look = looks([arm, "other", "zeta"])[arm]
    style = (Path(report.__file__).parent / "templates" / "style.css").read_text()
    light, dark = (re.findall(r"--card: (#\w{6})", style)[i] for i in (0, 1))
    for colour, paper in ((look.light, light), (look.dark, dark)):
        high, low = sorted((luminance(colour), luminance(paper)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (arm, colour, paper)
    if not look.key.startswith("other"):
        assert style.count(f"--arm-{look.key}: {look.light}") == 2  # on screen and in print
        assert style.count(f"--arm-{look.key}: {look.dark}") == 1


COMMANDS = """
import sys
from harness.calibrate import main as calibrate
from harness.dashboard import main as dashboard
from harness.decide.__main__ import main as decide
from harness.report.__main__ import main as report

study = sys.argv[1]
assert report([study]) == dashboard([sys.argv[2]]) == decide([study + "/scores.csv", "--metric", "checks"]) == 0
assert calibrate(["--repeats", "10", "--prompts", "20"]) == 0
assert not {"torch", "trl", "wandb", "datasets", "hydra"} & set(sys.modules)
"""


def test_the_same_study_gives_the_same_bytes_and_the_commands_need_no_torch(built, page, tmp_path):
    copy = Path(
        shutil.copytree(built, tmp_path / "copy" / "letters", ignore=shutil.ignore_patterns("figures", "report.*"))
    )
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(copy), str(copy.parent)],
        capture_output=True,
        text=True,
        env={"PYTHONHASHSEED": "7", "PATH": ""},
        cwd=Path(report.__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{copy / 'report.html'}\n")
    names = ["report.html", "report.md", *(f"figures/{path.name}" for path in sorted((built / "figures").iterdir()))]
    assert len(names) == 8
    for name in names:
        assert (copy / name).read_bytes() == (built / name).read_bytes(), name


# Wrong use


@pytest.mark.parametrize("name", ["absent", "empty", "."])
def test_a_wrong_folder_is_a_usage_error_with_status_2(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("harness.report: ")
    assert "such as results/STUDY" in captured.err
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_with_status_1(target, capsys):
    write_text(target / "figures", "a file where the folder should be")
    assert main([str(target)]) == 1
    assert "cannot write the report" in capsys.readouterr().err


# Hostile text

HOSTILE = {
    "script": "<script>alert(1)</script><img src=x onerror=alert(1)></p></section><style>*{display:none}</style>",
    "markdown": "| a | b |\n|---|---|\n```\n[x](javascript:alert(1)) ![i](http://evil.example/i.png) **b** <b>c</b> https://evil.example www.evil.example\n# heading\n- [ ] item",
    "backticks": "`````` ``` ` ~~~~ \n```\nout",
    "ansi": "\x1b[31mred\x1b[0m\x07\x00\x9b31m",
    "right_to_left": "abc \u202egnp.exe \u2066x\u2069 \u200f",
    "surrogate": "half \ud83d and \udc00",
    "invisible": "a\u200bb\ufeffc\U000e0041d\u2028e\ufffff",
    "formula": "=HYPERLINK(\"http://evil.example\")",
    "template": "{{ 7*7 }}{% for x in y %}${7*7}",
    "entities": "&lt;script&gt;&#60;b&#62; ]]> -->",
}  # fmt: skip
RAW = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\uffff\U000e0041]"
)


def plant(folder, text):
    """Put a text wherever a report shows what others wrote."""
    for path in [*folder.glob("trials/*/completions.jsonl"), folder / "base" / "completions.jsonl"]:
        write_jsonl(path, [row | {"prompt": text, "completion": text, "flags": [text]} for row in read_jsonl(path)])
    for path in folder.glob("trials/*/manifest.json"):
        change(path, warnings=[text], versions={text: text}, label_noise={"share": 0.1, "flipped": text}, engine=text)
    failed = manifests(folder, "dpo")[0]
    write_json(failed.parent / "failure.json", {"arm": "dpo", "seed": 0, "stage": text, "error": text, "message": text})
    guard = {"metric": text, "passed": False}
    change(folder / "verdict.json", reason=text, warnings=[text], guards=[guard])
    settings = {"study": text, "question": text, "command": text}
    settings["data"] = {"train": {"path": text, text: text}, text: text}
    write_text(folder / "study.yaml", json.dumps(settings))


@pytest.fixture(scope="module")
def tame(few, tmp_path_factory):
    """The page and the Markdown of a study with a harmless text in all places."""
    folder = Path(shutil.copytree(few, tmp_path_factory.mktemp("tame") / "letters"))
    plant(folder, "harmless")
    return rendered(folder)


def shape(page):
    """List a page's elements with the names of their attributes, but for the marks that `untrusted` adds."""
    return [(tag, sorted(attrs)) for tag, attrs in page.elements if attrs.get("class") not in ("escape", "cut")]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_does_nothing(target, tame, text):
    plant(target, text)
    page, source = rendered(target)
    assert shape(page) == shape(tame[0])
    assert not RAW.search(page.source)
    assert " ".join(visible(text).split()) in page.text
    for path in (target / "figures").iterdir():
        assert not RAW.search(path.read_text(encoding="utf-8"))
        ET.parse(path)
    check_markdown(source, tame[1], text)


def check_markdown(source, tame, text):
    """Check that the text stands in the Markdown, and that nothing came of it."""
    render = MarkdownIt("commonmark").enable("table").render
    page = Page(render(source))
    assert shape(page) == shape(Page(render(tame)))
    assert not RAW.search(source)
    assert " ".join(visible(text).split()) in page.text
    # GitHub would turn a bare address into a link: there is none outside of fenced blocks.
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", source, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"(?i)https?://|www\.|javascript:", outside)


@pytest.mark.parametrize(
    ("first", "second"),
    [("simpo", "<script>"), ("../../x", "$x^2$"), ("a|b", "\u202eodp")],
    ids=["tag", "path", "pipe"],
)
def test_a_hostile_name_of_an_arm_stays_a_name(tmp_path, first, second):
    folder = build_study(tmp_path / "letters", prompts=6)
    for old, new in (("simpo", first), ("dpo", second)):
        for path in manifests(folder, old):
            change(path, arm=new)
    frame = pd.read_csv(folder / "scores.csv", keep_default_na=False)
    frame["arm"] = frame["arm"].replace({"simpo": first, "dpo": second})
    frame.to_csv(folder / "scores.csv", index=False)
    change(folder / "verdict.json", arms=[first, second], n_seeds={first: 3, second: 3})
    page, _ = rendered(folder)
    assert visible(first) in page.text
    assert visible(second) in page.text
    assert [tag for tag, _ in page.elements].count("script") == 2
    names = [path.name for path in (folder / "figures").iterdir()]
    assert len(names) == 5
    assert all(re.fullmatch(r"[a-z0-9-]+\.svg", name) for name in names), names


def test_a_line_of_100_kb_is_cut_with_a_note(target):
    plant(target, "y" * 100_000)
    page, text = rendered(target)
    assert len(page.source) < 2_500_000  # each text stands in the page twice: as HTML and as data
    assert "cut: 1,500 of 100,000 characters shown" in page.text
    assert "cut: 800 of 100,000 characters shown" in text
    assert max(map(len, text.splitlines())) < 10_000


def test_escapes_are_told_from_text_that_looks_like_one():
    assert str(html("\x1b \\x1b")) == '<bdi><span class="escape">\\x1b</span> \\x1b</bdi>'
    assert visible("a\r\nb\rc\td") == "a\nb\\x0dc\td"
    assert one_line(" a\n\tb ", 10) == "a b"
    assert one_line("abcdef", 4) == "abcd… (cut: 4 of 6 characters shown)"


def test_joiners_that_languages_need_stay():
    persian, family = "می\u200cخواهم", "👩\u200d👧"
    assert visible(persian + family) == persian + family


def test_a_fence_is_longer_than_any_run_inside():
    assert str(fence("a ```` b")) == "`````text\na ```` b\n`````"
    assert [str(markdown(text)) for text in ("- item", "---", "+4.7", "−1")] == ["\\- item", "\\---", "+4.7", "−1"]
    assert str(markdown("a|b *c* http://x")) == "a&#124;b \\*c\\* http&#58;//x"


def test_a_cell_longer_than_pandas_shows_by_default_is_whole():
    table = build("caption", "corner", {"row": {"column": "z" * 200}}, {})
    assert "z" * 200 in table.html(looks(ARMS))


# Numbers


def test_numbers_are_written_for_people():
    assert [words.percent(v) for v in (0.12345, None, float("nan"), True, "x")] == ["12.3%", "–", "–", "–", "–"]
    assert [words.points(v) for v in (0.056, -0.056, 0.0, -0.0001)] == ["+5.6", "−5.6", "0.0", "0.0"]
    assert words.interval([-0.01, 0.02]) == "−1.0 to +2.0"
    assert [words.interval(v) for v in (None, [1], [None, 0.1], "ab")] == ["–"] * 4
    assert words.listing(["a", "b", "c"]) == "a, b and c"
    assert phrase({"longer": 3, "memory_bytes": 2**30, "empty": []}) == "longer: 3; memory: 1.0 GiB; empty: none"


def test_the_noise_of_the_reference_is_said_once_for_the_study_by_its_largest(target):
    assert facts.preconditions(read_study(target)) == []
    for path, gap, nats in zip(manifests(target, "dpo"), (2e-6, 4e-6), (0.2, 0.1), strict=False):
        noise = {"first_loss_gap": gap, "mean_nats": nats, "largest_nats": 3 * nats}
        write_json(path, read_json(path) | {"reference_noise": noise})
    assert facts.preconditions(read_study(target)) == [
        "The reference is computed as the policy is: DPO's first loss is log 2 within 4e-06; in bf16 the base's log-prob "
        "of an answer moves by 0.2 nats on average, and by 0.6 at most, with the pairs in its batch: those of the "
        "training are used."
    ]
