"""Publish a study to Weights & Biases: a study's folder -> uploaded runs, a workspace and a report.

Needs an account. The pages are built before the login, so that an unpublishable study is refused first.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import yaml

from harness.config.arms import BASE
from harness.decide.words import plural
from harness.report.study import Study
from harness.report.style import looks
from harness.report.summary import summarise
from harness.report.tables import score_table
from harness.score.settings import links_among, links_problem
from harness.study.errors import UsageError
from harness.study.files import Json, Reader, mapping, write_json
from harness.study.outcome import SPLIT_PREFIX, STEP
from harness.study.text import one_line
from harness.track.tracker import stop_service

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.reports.v2.interface import Block

TIMEOUT_SECONDS = 20
_PUBLISHED = "published.json"


class NotPublishedError(Exception):
    """The study is ready, and W&B did not accept it; the message names the next step."""


def publish_study(study: Study, entity: str | None = None) -> dict[str, str]:
    """Upload a study's offline runs, and write its workspace and report; a second call updates the same two pages.

    Args:
        study: the study to publish.
        entity: account or team; None for WANDB_ENTITY, else the user's own. The entity in the study's files is not
            used: somebody else may have written it.

    Returns:
        `{"workspace": URL, "report": URL}`, also written to `wandb/published.json` in the study's folder.

    Raises:
        UsageError: nothing to publish, a team that only the study names, links that lead out of its runs, or
            wandb-workspaces is not installed.
        NotPublishedError: no account, no answer, or W&B refused.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UsageError("--publish needs wandb-workspaces; install it: pip install 'dpo-simpo-harness[publish]'")
    target = _registered_target(study)
    offline = sorted(str(path) for path in study.folder.glob("wandb/offline-run-*"))
    if not offline and not any(study.folder.glob("wandb/run-*")):
        raise UsageError(
            f"{study.folder}: no W&B runs (tracking=none?); a study that is run with tracking=wandb has them"
        )
    _check_project(study, target.project)
    build_workspace(study, "entity", target.project)  # an unpublishable study is refused before the login
    build_report(study, "", target.project)
    owner = _entity(study, len(offline), entity or os.environ.get("WANDB_ENTITY"), target.entity)
    if offline:
        _sync(study, offline, owner, target.project)
    return _save(study, owner, target.project)


class _Target(NamedTuple):
    """Project and entity in the tracking section of the base's config."""

    project: str
    entity: str | None


def _registered_target(study: Study) -> _Target:
    tracking: Mapping[str, Json] = {}
    with contextlib.suppress(OSError, yaml.YAMLError):
        text = (study.folder / "base" / "config.yaml").read_text(encoding="utf-8")
        tracking = mapping(mapping(yaml.safe_load(text)).get("tracking"))
    entity = tracking.get("entity")
    return _Target(str(tracking.get("project") or "dpo-vs-simpo"), None if entity is None else str(entity))


def _check_project(study: Study, project: str) -> None:
    """Refuse a name that is no project's, and runs with files from outside their folder."""
    if not re.fullmatch(r"[\w.-]+( [\w.-]+)*", project):
        raise UsageError(f"tracking.project={one_line(project, 80)}: no name of a W&B project; allowed: a-z, 0-9, -, _")
    runs = list(study.folder.glob("wandb/offline-run-*"))
    paths = [path for run in runs for path in [run, *run.glob("*.wandb"), run / "files", *run.glob("files/**/*")]]
    if links := links_among(paths, study.folder):
        raise UsageError(links_problem(links))


def _entity(study: Study, runs: int, wanted: str | None, named: str | None) -> str:
    """Return the owner of the pages: the wanted one, else the account's own entity.

    Args:
        study: the study to publish.
        runs: number of runs to upload.
        wanted: entity that the user names.
        named: entity that the study names.

    Raises:
        UsageError: the study names an entity that is not the account's own, and the user none.
        NotPublishedError: no account, or it cannot be reached.
    """
    ready = (
        f"Prepared: {plural(runs, 'offline run')} to upload, a workspace and a report. To publish them, log in "
        f"(`wandb login`, or WANDB_API_KEY in the environment) and run `python -m harness.report {study.folder} "
        f"--publish` again; to upload the runs alone: `wandb sync {study.folder}/wandb/offline-run-*`"
    )
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        if not wandb.login(prompt=False):
            raise NotPublishedError(f"no W&B account is known here. {ready}")
        owner = str(wanted or wandb.Api(timeout=TIMEOUT_SECONDS).default_entity)
    except NotPublishedError:
        raise
    except Exception as error:  # W&B's errors have no common base
        stop_service()  # it goes on asking for minutes, and this process would wait for it before it ends
        raise NotPublishedError(f"W&B did not answer or refused: {one_line(str(error), 300)}. {ready}") from error
    if not wanted and named not in (None, owner):
        place = one_line(named, 80)
        raise UsageError(
            f"tracking.entity={place}: only the study names this entity, and the files of a results folder do not "
            f"decide where anything is sent; allowed: what you type; add --entity {shlex.quote(place)} or --entity "
            f"{owner}"
        )
    return owner


def _sync(study: Study, offline: Sequence[str], entity: str, project: str) -> None:
    """Upload offline runs; W&B's own command leaves out those that were uploaded before."""
    place = ["--entity", entity, "--project", project]  # the runs themselves may name another one
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *place, *offline]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = one_line((done.stderr or done.stdout).strip()[-300:], 300)
        raise NotPublishedError(
            f"`wandb sync {study.folder}/wandb/offline-run-*` failed: {said}; nothing is lost: the same command again "
            "uploads what is missing"
        )


def _save(study: Study, entity: str, project: str) -> dict[str, str]:
    """Save both pages, under their earlier addresses where these still exist."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    known = Reader(study.folder).mapping(study.folder / "wandb" / _PUBLISHED)
    urls = {}
    pages = {
        "workspace": (build_workspace(study, entity, project), ws.Workspace),
        "report": (build_report(study, entity, project), wr.Report),
    }
    try:
        for name, (page, kind) in pages.items():
            urls[name] = str(_at_address(page, kind, known.get(name)).save().url)
            write_json(study.folder / "wandb" / _PUBLISHED, {**known, **urls})
    except Exception as error:  # neither library has a base of its own for its errors
        raise NotPublishedError(
            f"the runs are uploaded, but W&B did not take the {name}: {one_line(str(error), 300)}; run it again"
        ) from error
    return urls


def _at_address(
    page: ws.Workspace | wr.Report, kind: type[ws.Workspace | wr.Report], url: Json
) -> ws.Workspace | wr.Report:
    """Return the existing page at an address with the content of `page`; `page` itself where there is no such page.

    The study names the address: it must not overwrite this user's other pages.
    """
    if not url:
        return page
    try:
        old = kind.from_url(str(url))
    except Exception:  # deleted, or of another account
        return page
    if any(getattr(old, name, None) != getattr(page, name, None) for name in ("entity", "project", "title", "name")):
        return page
    for name in ("title", "description", "blocks", "name", "sections", "settings", "runset_settings"):
        if hasattr(page, name):
            setattr(old, name, getattr(page, name))
    return old


def build_workspace(study: Study, entity: str, project: str) -> ws.Workspace:
    """Return the workspace: the study's runs grouped by arm; scores, training and figures as sections."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    scored = sorted({str(scorer) for scorer in study.scores["scorer"].unique()} - {study.metric})
    golden = [wr.BarPlot(title=name, metrics=[name]) for name in _score_keys([study.metric, *scored])]
    training = [wr.LinePlot(title=key, x=STEP, y=[key]) for key in _training_keys(study)]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Study {one_line(study.name, 80)}",
        sections=[
            ws.Section(name="Scores", panels=golden, is_open=True),
            ws.Section(name="Training (other quantities for each arm: do not compare)", panels=training, is_open=True),
            ws.Section(name="Figures and completions", panels=_pages(study), is_open=True),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Metric("Group") == study.name),
            groupby=[expr.Metric("JobType")],
            group_colors={arm: look.light for arm, look in looks([*study.arms, BASE]).items()},
        ),
    )


def build_report(study: Study, entity: str, project: str) -> wr.Report:
    """Return the report: verdict, recommendation, scores, training of each arm by itself, completions."""
    import wandb_workspaces.reports.v2 as wr

    of_study = _runset(study, entity, project, "study", "Verdict")
    arms = [
        _runset(study, entity, project, arm, look.title) for arm, look in looks(study.arms).items() if arm in study.arms
    ]
    scores = score_table(study)
    summary = summarise(study)
    blocks: list[Block] = [
        wr.H1(text=_plain(summary.headline)),
        wr.P(text=_plain(summary.recommendation)),
        *([wr.UnorderedList(items=list(map(_plain, summary.caveats)))] if summary.caveats else []),
        wr.P(text=_plain(summary.reason)),
        wr.P(text=_plain(summary.level)),
        wr.UnorderedList(items=[_plain(f"{name}: {text}") for name, text in summary.key_facts.items()] or ["–"]),
        wr.H2(text="Figures and completions"),
        wr.PanelGrid(runsets=[of_study], panels=_pages(study)),
        wr.H2(text="Scores"),
        *([wr.MarkdownBlock(text=str(scores.markdown(looks(study.arms))))] if scores else []),
        wr.PanelGrid(
            runsets=arms, panels=[wr.BarPlot(title=key, metrics=[key]) for key in _score_keys([study.metric])]
        ),
        wr.H2(text="Training"),
        wr.P(text="Read each arm by itself: losses and rewards of the arms are different quantities."),
    ]
    for runset in arms:
        panels = [wr.LinePlot(title=f"{runset.name}: {key}", x=STEP, y=[key]) for key in _training_keys(study)]
        blocks.append(wr.PanelGrid(runsets=[runset], panels=panels))
    command = study.settings.get("command")
    if command:
        blocks += [wr.H2(text="How to reproduce"), wr.CodeBlock(code=_plain(str(command)))]
    return wr.Report(
        project=project,
        entity=entity,
        title=_plain(f"Study {study.name}")[:128],
        description=_plain(str(study.settings.get("question") or ""))[:500],
        blocks=blocks,
        width="fluid",
    )


def _plain(text: str) -> str:
    return one_line(text, 2000)


def _runset(study: Study, entity: str, project: str, job_type: str, name: str) -> wr.Runset:
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    filters = expr.And(expr.Metric("Group") == study.name, expr.Metric("JobType") == job_type)
    return wr.Runset(entity=entity, project=project if entity else "", name=_plain(name), filters=filters)


def _score_keys(scorers: Sequence[str]) -> list[str]:
    return [f"{prefix}/{scorer}" for scorer in scorers if scorer for prefix in reversed(SPLIT_PREFIX.values())]


def _training_keys(study: Study) -> list[str]:
    """Return the W&B names of the metrics in the training logs: losses, gradients and rewards."""
    logged = {key for trial in study.trials for step in trial.steps for key in step}
    wanted = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "learning_rate")
    return [f"train/{key}" for key in wanted if key in logged]


def _pages(study: Study) -> list[wr.MediaBrowser | wr.WeavePanelSummaryTable]:
    """Return panels of the study's own run: its figures, the whole report, the answers side by side."""
    import wandb_workspaces.reports.v2 as wr

    keys = [f"figures/{path.stem}" for path in sorted((study.folder / "figures").glob("*.svg"))]
    wide = wr.Layout(w=24, h=12)
    figures = [wr.MediaBrowser(title=key, media_keys=[key], num_columns=1, layout=wide) for key in [*keys, "report"]]
    return [*figures, wr.WeavePanelSummaryTable(table_name="side_by_side", layout=wide)]
