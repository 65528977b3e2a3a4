"""`python -m sde.report`: a run, or several, on one HTML page that stands alone and needs no account anywhere."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Any

from sde.cli import default_settings, run_command
from sde.errors import UserError, check_flag, check_number
from sde.files import write_text
from sde.models.base import check_count
from sde.reporting.media import gather
from sde.reporting.page import make_page
from sde.reporting.record import choose_runs, read_record, short_names


def report(config: dict[str, Any]) -> None:
    """Write the page that `config` asks for, and print where it is."""
    check_flag("open", config["open"])
    count = check_count("previews", config["previews"])
    check_number("max_megabytes", config["max_megabytes"], above=0)
    runs = choose_runs(config["run"], Path(str(config["runs"])))
    out = page_path(config["out"], runs[0].path if len(runs) == 1 else Path())
    records = [read_record(run, name) for run, name in zip(runs, short_names(runs), strict=True)]
    budget = 1e6 * config["max_megabytes"] / len(runs)
    galleries = [gather(run.path, count, budget) for run in runs]
    write_text(out, make_page(records, galleries, default_settings("train")))
    print(out)
    if config["open"]:
        webbrowser.open(out.resolve().as_uri())


def page_path(out: Any, folder: Path) -> Path:
    """Where the page goes: `out`, or report.html in `folder`.

    Raises:
        UserError: for anything but the name of a page, so that no other file is written over.
    """
    path = folder / "report.html" if out is None else Path(str(out)).expanduser()
    if path.suffix not in (".html", ".htm") or path.is_dir():
        raise UserError(f"out={out} is no name for a page: give a file that ends in .html")
    return path


def main() -> None:
    """Entry point of the command line."""
    run_command("report", report)


if __name__ == "__main__":
    main()
