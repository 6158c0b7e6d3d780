"""The panels of the local page as a W&B workspace and a report, so that a project's are never drawn
by hand. Needs the extra `dashboards`.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.tracking.panels import SECTIONS, X_AXIS, Panel


def line_plot(panel: Panel) -> Any:
    """A panel of both: every run's curve of the panel's metrics over pairs seen."""
    from wandb_workspaces.reports import v2 as reports

    plain = [key for key in panel.keys if "*" not in key]
    patterns = [key.replace(".", r"\.").replace("*", ".*") for key in panel.keys if "*" in key]
    regex = "|".join([*patterns, *plain]) if patterns else None
    return reports.LinePlot(
        title=panel.title,
        x=X_AXIS,
        y=plain if regex is None else [],
        metric_regex=regex,
        title_x="pairs seen",
        title_y=panel.unit or None,
        log_y=panel.logarithmic or None,
    )


def workspace(*, entity: str, project: str, name: str = "pairwright") -> Any:
    """A saved view with a section for each of ours. Nothing is sent before `.save()`."""
    from wandb_workspaces import workspaces

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(
                name=section.title, panels=[line_plot(p) for p in section.panels], is_open=True
            )
            for section in SECTIONS
        ],
    )


def report(*, entity: str, project: str, runs: Sequence[str] = ()) -> Any:
    """A page of text and plots over a project's runs, or over those named. Sent by `.save()`."""
    from wandb_workspaces.reports import v2 as reports

    runset = reports.Runset(entity=entity, project=project, query="|".join(runs))
    blocks: list[Any] = [reports.TableOfContents()]
    for section in SECTIONS:
        panels = [line_plot(panel) for panel in section.panels]
        blocks += [
            reports.H1(text=section.title),
            reports.PanelGrid(runsets=[runset], panels=panels),
        ]
    return reports.Report(
        entity=entity, project=project, title=f"{project}: training", blocks=blocks, width="fluid"
    )
