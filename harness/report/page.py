"""The report of one study: results/STUDY/ -> report.html, report.md, figures/*.svg.

Command: `python -m harness.report results/STUDY`. Imports no torch, needs no network, and writes the same bytes for the
same study.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.config.arms import BASE, title
from harness.report import facts, tables, words
from harness.report.claims import claims_table, family_table, ingredient_table
from harness.report.facts import cost_table
from harness.report.figures import draw_interval, draw_learning, draw_lengths
from harness.report.prompts import Answer, SideBySide, draw_length_scores, draw_prompts, moved_table, side_by_side
from harness.report.search import draw_search, sensitivity_table
from harness.report.study import Study, read_study
from harness.report.style import THEME, Look, inline, looks
from harness.report.tables import Table, judge_table, score_table
from harness.report.words import disagreement
from harness.study.files import write_text
from harness.study.text import cut, cut_note, fence, html, markdown, visible

_TEMPLATES = Path(__file__).parent / "templates"
# A Markdown page of 40 prompts is not read; the first ones differ most.
_MARKDOWN_PROMPTS = 12


def render_report(study: Path) -> Path:
    """Write report.html, report.md and figures/ of a study in whatever state it is; return the path of report.html.

    Raises:
        UsageError: the folder is not a study.
    """
    content = _content(read_study(study))
    environment = _environment(content["looks"])
    for drawing in content["drawings"]:
        write_text(study / "figures" / f"{drawing.name}.svg", drawing.svg)
    _remove_stale(study / "figures", {f"{drawing.name}.svg" for drawing in content["drawings"]})
    write_text(study / "report.md", environment.get_template("report.md.j2").render(content))
    path = study / "report.html"
    write_text(path, environment.get_template("report.html.j2").render(content))
    return path


def _content(study: Study) -> dict[str, Any]:
    """Return all that the templates show."""
    arm_looks = looks(study.arms)
    identity = facts.identity_of(study)
    interval, lengths = draw_interval(study, arm_looks), draw_lengths(study, arm_looks)
    learning = draw_learning(study, arm_looks)
    search = draw_search(study, arm_looks)
    prompts, length_scores = draw_prompts(study, arm_looks), draw_length_scores(study, arm_looks)
    found = (interval, prompts, *search, *learning, lengths, length_scores)
    drawings = [drawing for drawing in found if drawing]
    compared: SideBySide = side_by_side(study)
    script, script_source = page_script(_TEMPLATES / "browser.js")
    return {
        "study": study,
        "page_title": visible(f"{words.headline(study)} · {study.name}"),
        "looks": arm_looks,
        "arms": [arm_looks[arm] for arm in study.arms],
        "base": arm_looks[BASE],
        "drawings": drawings,
        "interval": interval,
        "learning": learning,
        "search": search,
        "lengths": lengths,
        "prompts": prompts,
        "length_scores": length_scores,
        **_verdict(study, identity),
        **_tables(study),
        "identity": facts.identity_sentence(identity),
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


def _verdict(study: Study, identity: Mapping[str, Any]) -> dict[str, Any]:
    level = str(study.verdict.get("level") or "")
    verdict = str(study.verdict.get("verdict") or "")
    return {
        "headline": words.headline(study),
        "reason": " ".join(filter(None, (words.reason(study), disagreement(study)))),
        "level": words.LEVELS.get(level, ""),
        "next_step": words.next_step(study),
        "warnings": words.warnings(study, identity),
        "key_facts": words.key_facts(study),
        "accent": verdict if verdict in study.arms else "",
        "pairs_only": study.metric.startswith(words.PREFERENCE),
    }


def _tables(study: Study) -> dict[str, Table | None]:
    return {
        "scores": score_table(study),
        "ingredients": ingredient_table(study),
        "claims": claims_table(study),
        "family": family_table(study),
        "sensitivity": sensitivity_table(study),
        "preferences": tables.preference_table(study),
        "judge": judge_table(study),
        "moved": moved_table(study),
        "degenerate": tables.degenerate_table(study),
        "guards": tables.guard_table(words.guards(study)),
        "trials": tables.trial_table(study),
        "length_table": tables.length_table(study),
        "costs": cost_table(study),
        "hashes": facts.identity_table(study),
        "splits": facts.split_table(study),
    }


def _environment(arm_looks: Mapping[str, Look]) -> Environment:
    """Return the templates' environment: everything is escaped unless a filter made it harmless before."""
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


_LIMIT = 1500  # characters of a prompt or an answer that are shown
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def page_script(path: Path) -> tuple[Markup, str]:
    """Return a script as it stands in a page, and the source expression that allows it and nothing else."""
    text = path.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), f"'sha256-{digest}'"


def page_data(compared: SideBySide, looks: Mapping[str, Look]) -> Markup:
    """Return the comparisons as JSON that can stand in a script element.

    `arms` has [key, glyph, title] of each policy; a row is [prompt_id, prompt, answers], and an answer [text, score,
    number or null, flags, failed checks, tokens or null], in the order of `arms`.
    """
    first = compared.comparisons[0].answers if compared.comparisons else ()
    arms = [[looks[one.arm].key, looks[one.arm].glyph, visible(looks[one.arm].title)] for one in first]
    rows = [
        [one.prompt_id, _text(one.prompt), [_answer(answer) for answer in one.answers]] for one in compared.comparisons
    ]
    return json_in_page({"arms": arms, "rows": rows})


def json_in_page(value: object) -> Markup:
    """Return JSON that can stand in a script element: it holds nothing that HTML would read."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.translate(_ESCAPES))


def _answer(answer: Answer) -> list[object]:
    flags, failed = ([visible(text) for text in texts] for texts in (answer.flags, answer.failed))
    return [_text(answer.text), answer.score, answer.value, flags, failed, answer.tokens]


def _text(text: str) -> str:
    note = cut_note(text, _LIMIT)
    return visible(cut(text, _LIMIT)) + (f"… ({note})" if note else "")
