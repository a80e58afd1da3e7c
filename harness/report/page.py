"""The report of one study: results/STUDY/ -> report.html, report.md, figures/*.svg.

The same study gives the same bytes. Imports no torch, needs no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.config.arms import BASE, title
from harness.decide.words import guards
from harness.report import facts, tables
from harness.report.claims import claims_table
from harness.report.effects import family_table, ingredient_table
from harness.report.figures import draw_interval, draw_learning, draw_lengths
from harness.report.prompts import Answer, SideBySide, draw_length_scores, draw_prompts, moved_table, side_by_side
from harness.report.search import draw_search, sensitivity_table
from harness.report.study import Study, read_study
from harness.report.style import PREFERENCE, THEME, Drawing, Look, inline, looks
from harness.report.summary import summarise, warnings
from harness.report.tables import Table
from harness.study.files import FileCache, Json, write_text
from harness.study.text import cut, cut_note, fence, html, markdown, visible

_TEMPLATES = Path(__file__).parent / "templates"
_MARKDOWN_PROMPTS = 12  # nobody reads a Markdown page of 40 prompts; the first ones differ most
_MAX_CHARACTERS = 1500  # shown of a prompt or an answer
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def render_report(study: Path, files: FileCache | None = None) -> Path:
    """Write report.html, report.md and figures/ of a study in any state; return the path of report.html.

    Raises:
        UsageError: the folder is not a study.
    """
    found = read_study(study, files)
    arm_looks = looks(found.arms)
    figures = _figures(found, arm_looks)
    content = _content(found, arm_looks, figures)
    environment = _environment(arm_looks)
    for drawing in figures.all:
        write_text(study / "figures" / f"{drawing.name}.svg", drawing.svg)
    _remove_stale(study / "figures", {f"{drawing.name}.svg" for drawing in figures.all})
    write_text(study / "report.md", environment.get_template("report.md.j2").render(content))
    path = study / "report.html"
    write_text(path, environment.get_template("report.html.j2").render(content))
    return path


class _Figures(NamedTuple):
    """The figures of a report; None where the study has nothing to draw."""

    interval: Drawing | None
    prompts: Drawing | None
    search: list[Drawing]
    learning: list[Drawing]
    lengths: Drawing | None
    length_scores: Drawing | None

    @property
    def all(self) -> list[Drawing]:
        """All of them."""
        single = (self.interval, self.prompts, self.lengths, self.length_scores)
        return [*self.search, *self.learning, *(drawing for drawing in single if drawing)]


def _figures(study: Study, arm_looks: Mapping[str, Look]) -> _Figures:
    return _Figures(
        interval=draw_interval(study, arm_looks),
        prompts=draw_prompts(study, arm_looks),
        search=draw_search(study, arm_looks),
        learning=draw_learning(study, arm_looks),
        lengths=draw_lengths(study, arm_looks),
        length_scores=draw_length_scores(study, arm_looks),
    )


def _content(study: Study, arm_looks: Mapping[str, Look], figures: _Figures) -> dict[str, object]:
    """Return the variables of the templates."""
    identity = facts.identity_of(study)
    summary = summarise(study)
    compared = side_by_side(study)
    script, script_source = page_script(_TEMPLATES / "browser.js")
    verdict = str(study.verdict.get("verdict") or "")
    return {
        "study": study,
        "page_title": visible(f"{summary.headline} · {study.name}"),
        "looks": arm_looks,
        "arms": [arm_looks[arm] for arm in study.arms],
        "base": arm_looks[BASE],
        **figures._asdict(),
        **summary._asdict(),
        "warnings": warnings(study, identity),
        "accent": verdict if verdict in study.arms else "",
        "pairs_only": study.metric.startswith(PREFERENCE),
        **_tables(study),
        "identity": facts.identity_sentence(identity),
        "preconditions": facts.preconditions(study),
        "proved": identity.get("status") == "proved",
        "compared": compared,
        "completions_data": page_data(compared, arm_looks),
        "script": script,
        "script_source": script_source,
        "few_compared": compared.comparisons[:_MARKDOWN_PROMPTS],
        "facts": facts.facts(study),
        "failed": facts.failed_trials(study),
        "command": str(study.settings.get("command") or ""),
    }


def _tables(study: Study) -> dict[str, Table | None]:
    return {
        "scores": tables.score_table(study),
        "ingredients": ingredient_table(study),
        "claims": claims_table(study),
        "family": family_table(study),
        "sensitivity": sensitivity_table(study),
        "preferences": tables.preference_table(study),
        "judge": tables.judge_table(study),
        "moved": moved_table(study),
        "degenerate": tables.degenerate_table(study),
        "ranking": tables.ranking_table(study.verdict),
        "guards": tables.guard_table(guards(study.verdict)),
        "trials": tables.trial_table(study),
        "length_table": tables.length_table(study),
        "costs": facts.cost_table(study),
        "hashes": facts.identity_table(study),
        "splits": facts.split_table(study),
    }


def _environment(arm_looks: Mapping[str, Look]) -> Environment:
    """Return the templates' environment: all text is escaped unless a filter made it harmless before."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    colours = {look.light: f"arm-{look.key}" for look in arm_looks.values()} | THEME
    filters: dict[str, Callable[..., Markup]] = {
        "text": html,
        "md": markdown,
        "fence": fence,
        "table": lambda table: table.html(arm_looks),
        "md_table": lambda table: table.markdown(arm_looks),
        "figure": lambda drawing: inline(drawing.svg, colours),
    }
    environment.filters.update(filters)
    environment.globals.update(title=title, style=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")))
    return environment


def _remove_stale(folder: Path, current: set[str]) -> None:
    """Remove figures of an earlier report that this one no longer has."""
    for path in folder.glob("*.svg"):
        if path.name not in current:
            path.unlink()


def page_script(path: Path) -> tuple[Markup, str]:
    """Return a script for a page, and the CSP source expression that allows this script alone."""
    text = path.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), f"'sha256-{digest}'"


def page_data(compared: SideBySide, looks: Mapping[str, Look]) -> Markup:
    """Return the comparisons as JSON for a script element.

    `arms` has [key, glyph, title] of each policy; a row is [prompt_id, prompt, answers], and an answer [text, score,
    number or null, flags, failed checks, tokens or null], in the order of `arms`.
    """
    first = compared.comparisons[0].answers if compared.comparisons else ()
    arms = [[looks[one.arm].key, looks[one.arm].glyph, visible(looks[one.arm].title)] for one in first]
    rows = [
        [one.prompt_id, _shown_text(one.prompt), [_answer_data(answer) for answer in one.answers]]
        for one in compared.comparisons
    ]
    return json_in_page({"arms": arms, "rows": rows})


def json_in_page(value: Json) -> Markup:
    """Return JSON for a script element: `<`, `>` and `&` are escaped, so that HTML finds no markup in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.translate(_ESCAPES))


def _answer_data(answer: Answer) -> list[Json]:
    flags, failed = ([visible(text) for text in texts] for texts in (answer.flags, answer.failed))
    return [_shown_text(answer.text), answer.score, answer.value, flags, failed, answer.tokens]


def _shown_text(text: str) -> str:
    note = cut_note(text, _MAX_CHARACTERS)
    return visible(cut(text, _MAX_CHARACTERS)) + (f"… ({note})" if note else "")
