"""The data docs as a static site: our page of results at the top, Great Expectations' own pages below it.

Great Expectations' pages load scripts from six hosts, a logo that reports every view to another, and show nothing
without them. Here they lose all of that and get a small style sheet, so that they open from a disk without a network.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .suite import Outcome

SITE = "site"
"""Great Expectations' pages, which hold times: outside the artifact's seal."""
REMOTE = re.compile(
    r"<script\b.*?</script>|<link\b[^>]*>|<img\b[^>]*>|<footer\b.*?</footer>|<div class=\"modal.*?<!-- modal -->", re.S
)
"""Scripts (all of them need jQuery), style sheets, images and the newsletter."""
REMOTE_IMAGE = re.compile(r"url\([^)]*\)")
STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid #ddd; }
th { color: #666; font-weight: 600; } h5 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; } ol, ul { padding-left: 1.2rem; }
.badge { background: #eee; border-radius: 3px; padding: 0 .3rem; } a { color: #1558b0; }
.fa-check-circle::before { content: "passed"; color: #1a7f37; } .fa-times::before { content: "failed"; color: #c62828; }
.fa-exclamation-triangle::before { content: "warning"; color: #9a6700; } i { font-style: normal; }
.card.mb-3, .modal, .ge-walkthrough-modal, button, .cloud-footer, .cta { display: none; }
</style></head>"""
BACK = '<!DOCTYPE html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=../index.html">\n'


def write_docs(
    folder: Path,
    pages: Path,
    outcomes: list[Outcome],
    counts: Mapping[str, int],
    reasons: list[dict[str, Any]],
) -> None:
    """Write `index.html`, `expectations.json` and `site/`.

    Args:
        folder: Of the `docs` artifact.
        pages: Great Expectations' site.
        outcomes: Of all expectations.
        counts: Rows by name, shown at the top.
        reasons: Of the quarantine: `code`, `count`, `place` and `message` of the first, `fix`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / SITE, ignore_errors=True)
    for page in sorted(path for path in pages.rglob("*.html") if path.parent != pages):
        target = folder / SITE / page.relative_to(pages)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(offline(page.read_text(encoding="utf-8")), encoding="utf-8")
    (folder / SITE / "index.html").write_text(BACK, encoding="utf-8")
    text = json.dumps([outcome.as_json() for outcome in outcomes], indent=1, ensure_ascii=False)
    (folder / "expectations.json").write_text(text + "\n", encoding="utf-8")
    suites: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        suites.setdefault(outcome.suite, []).append(outcome)
    index = _render(suites=suites, counts=counts, reasons=reasons, links=_links(folder))
    (folder / "index.html").write_text(index, encoding="utf-8")


def offline(page: str) -> str:
    """Return a page of Great Expectations without anything that it would fetch."""
    return REMOTE_IMAGE.sub("none", REMOTE.sub("", page)).replace("</head>", STYLE, 1)


def _links(folder: Path) -> dict[str, str]:
    """Return the page of each suite's results, relative to the folder."""
    pages = sorted((folder / SITE / "validations").rglob("*.html"))
    return {page.relative_to(folder / SITE).parts[1]: page.relative_to(folder).as_posix() for page in pages}


def _render(**values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("index.html.j2").render(**values) + "\n"
