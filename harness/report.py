"""The report of one study: results/STUDY/ -> report.html, report.md, figures/*.svg.

Command: `python -m harness.report results/STUDY`. Imports no torch, needs no network, and writes the same bytes for the
same study.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness import cautions, evidence, frames, wording
from harness.browser import page_data, page_script
from harness.claims import claims_table
from harness.costs import cost_table
from harness.family import family_table
from harness.figures import draw_interval, draw_learning, draw_lengths
from harness.frames import Table
from harness.gridplots import draw_search
from harness.ingredients import ingredient_table
from harness.judgetable import judge_table
from harness.outside import in_one_sentence
from harness.palette import BASE, THEME, Look, looks, title
from harness.promptplots import draw_length_scores, draw_prompts, moved_table
from harness.records import UsageError, write_text
from harness.scoretable import score_table
from harness.secondopinion import disagreement
from harness.sensitivity import sensitivity_table
from harness.sidebyside import SideBySide, side_by_side
from harness.study import Study, read_study
from harness.svg import inline
from harness.untrusted import fence, html, markdown, visible

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
    identity = evidence.identity_of(study)
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
        "page_title": visible(f"{wording.headline(study)} · {study.name}"),
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
        "identity": evidence.identity_sentence(identity),
        "proved": identity.get("status") == "proved",
        "compared": compared,
        "completions_data": page_data(compared, arm_looks),
        "script": script,
        "script_source": script_source,
        "few_compared": compared.comparisons[:_MARKDOWN_PROMPTS],
        "facts": evidence.facts(study),
        "failed": evidence.failed_trials(study),
        "command": str(study.settings.get("command") or ""),
    }


def _verdict(study: Study, identity: Mapping[str, Any]) -> dict[str, Any]:
    level = str(study.verdict.get("level") or "")
    verdict = str(study.verdict.get("verdict") or "")
    return {
        "headline": wording.headline(study),
        "reason": " ".join(filter(None, (wording.reason(study), disagreement(study)))),
        "level": wording.LEVELS.get(level, ""),
        "next_step": wording.next_step(study),
        "warnings": cautions.warnings(study, identity),
        "key_facts": wording.key_facts(study),
        "accent": verdict if verdict in study.arms else "",
        "pairs_only": study.metric.startswith(wording.PREFERENCE),
    }


def _tables(study: Study) -> dict[str, Table | None]:
    return {
        "scores": score_table(study),
        "ingredients": ingredient_table(study),
        "claims": claims_table(study),
        "family": family_table(study),
        "sensitivity": sensitivity_table(study),
        "preferences": frames.preference_table(study),
        "judge": judge_table(study),
        "moved": moved_table(study),
        "degenerate": frames.degenerate_table(study),
        "guards": frames.guard_table(wording.guards(study)),
        "trials": frames.trial_table(study),
        "length_table": frames.length_table(study),
        "costs": cost_table(study),
        "hashes": evidence.identity_table(study),
        "splits": evidence.split_table(study),
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


@in_one_sentence("harness.report")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.report",
        description="Write the report of a study: report.html, report.md and figures/. Trains and scores nothing.",
        epilog="Example: python -m harness.report results/my-study",
    )
    parser.add_argument("study", type=Path, help="a folder under results/ that harness.sweep wrote, finished or not")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="upload the runs to W&B, with a workspace and a report (needs an account)",
    )
    parser.add_argument("--entity", help="account or team of W&B to publish to (default: WANDB_ENTITY, else your own)")
    arguments = parser.parse_args(argv)
    try:
        print(render_report(arguments.study))
        return _publish(arguments.study, arguments.entity) if arguments.publish else 0
    except UsageError as error:
        print(f"harness.report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"harness.report: cannot write the report: {error}; free the disk or the folder, and run again",
            file=sys.stderr,
        )
        return 1


def _publish(study: Path, entity: str | None) -> int:
    from harness.publish import NotPublishedError, publish_study

    try:
        for name, url in publish_study(read_study(study), entity).items():
            print(f"{name}: {url}")
    except NotPublishedError as error:
        print(f"harness.report: not published: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
