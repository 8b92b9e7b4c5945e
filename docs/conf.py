"""Sphinx's configuration of the site, which ``bash scripts/docs.sh`` builds."""

import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MAX_SECONDS = 60  # of one tutorial, on one core

# What tutorials run in: the commands of this environment, one thread, the site's figures.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ["MATPLOTLIBRC"] = str(DOCS / "matplotlibrc")
os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "96", "ATOMEQ_SOURCE": str(ROOT)}
os.environ["TTY_COMPATIBLE"] = "0"  # a kernel asks for colours, which are escapes on a page

project = "atomeq"
author = "The atomeq developers"
copyright = author
version = release = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[0]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "README.md"]  # index.md includes that one
html_theme = "furo"
html_title = f"atomeq {release}"
html_theme_options: dict[str, Any] = {"navigation_with_keys": True}
html_theme_options["light_css_variables"] = {"code-font-size": "0.75rem"}  # 98 letters a line
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = -1  # a busy machine is slow by the clock; the limit is in CPU seconds
nb_execution_show_tb = True
nb_output_stderr = "remove"
nb_merge_streams = True

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # shapes and units stand in the docstrings
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# Files above docs/ that are pages here, by the page that includes them.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "configs/README.md": "configurations.md",
    **{
        f"potentials/{path.name}/README.md": f"{path.name}.md"
        for path in (ROOT / "potentials").iterdir()
        if path.is_dir()
    },
}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def led_into_the_site(text: str, folder: Path, page: Path) -> str:
    """Return the text of a page with links that hold in the site as in the repository.

    Links out of docs/ lead to the page that includes the file, other files are offered for
    download, and a folder, which the site cannot show, keeps its name alone. A page that is called
    by its file's name is called by its title here.
    """

    def there(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        path = (folder / target).resolve()
        if "://" in target or not path.exists():
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            return words
        if name in PAGES:
            path, anchor = DOCS / PAGES[name], ""
        if words == target:
            words = ""  # the title of the page, by MyST
        return f"[{words}]({os.path.relpath(path, page.parent)}{anchor})"

    return _LINK.sub(there, text)


def on_page(app: Any, name: str, source: list[str]) -> None:
    """Mend the links of a page as it is read."""
    page = Path(app.env.doc2path(name))
    source[0] = led_into_the_site(source[0], page.parent, page)


def on_included(app: Any, path: Path, parent: str, content: list[str]) -> None:
    """Mend the links of a file that a page includes."""
    folder = (DOCS / path).resolve().parent
    content[0] = led_into_the_site(content[0], folder, Path(app.env.doc2path(parent)))


_CODE = re.compile(r"(``.*?``|`[^`]+`)")
_MARKS = re.compile(r"(?<![\w*])\*(?=[,)\]\s])|\||(?<=\w)_(?!\w)")


def as_written(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Show shapes ``(*, 3)``, norms |r| and names x_ in docstrings as they are written there."""
    for k, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...", "====")):
            bullet, rest = re.fullmatch(r"(\s*(?:\* )?)(.*)", line).groups()
            pieces = _CODE.split(rest)
            pieces[::2] = [_MARKS.sub(r"\\\g<0>", piece) for piece in pieces[::2]]
            lines[k] = bullet + "".join(pieces)


class Clock:
    """Tells what each tutorial took; one that takes too long is a warning, and so an error."""

    def __init__(self) -> None:
        self.before = self.spent()

    def spent(self) -> float:
        """Return the CPU seconds of all processes that were started and have ended."""
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def lap(self, app: Any, doctree: Any) -> None:
        """Measure the page that was just read."""
        from sphinx.util import logging

        seconds, self.before = self.spent() - self.before, self.spent()
        logger = logging.getLogger(__name__)
        if seconds > 1:
            logger.info(" %s took %.0f CPU seconds", app.env.docname, seconds)
        if seconds > MAX_SECONDS:
            logger.warning("%s took more than %d CPU seconds", app.env.docname, MAX_SECONDS)


def setup(app: Any) -> None:
    """Connect what is above; Sphinx calls this."""
    app.connect("source-read", on_page)
    app.connect("include-read", on_included)
    app.connect("autodoc-process-docstring", as_written, priority=100)  # before napoleon's
    app.connect("doctree-read", Clock().lap)
