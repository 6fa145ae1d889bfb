"""Site pages from outside this folder (README, examples, their results), formulas, and the header.

Texts elsewhere in the repository become pages, so that nothing is written twice, and links between
files of the repository become links between pages. Formulas become MathML while the site is built:
a browser needs neither a script nor the network for them.
"""

import ast
import html
import itertools
import json
import posixpath
import re
import textwrap
import tomllib
from pathlib import Path

from latex2mathml import converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from gradhpo import __version__


ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
READING = sorted(path.stem for path in (ROOT / "examples" / "reading").glob("*.py"))
NOTEBOOKS = sorted(path.stem for path in (ROOT / "examples" / "notebook").glob("*.ipynb"))
RESULTS = sorted(str(x.relative_to(ROOT)) for x in (ROOT / "benchmarks/results").rglob("*.txt"))
# Files of the repository that become pages, or parts of pages.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE.txt",
    "CITATION.cff": "CITATION.cff.txt",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/NOTES.md": "benchmarks_notes.md",
    "benchmarks/costs/README.md": "benchmarks/costs.md",
    "benchmarks/peers/README.md": "benchmarks/peers.md",
    "benchmarks/trust/README.md": "benchmarks/trust.md",
    "benchmarks/tables/README.md": "benchmarks/tables.md",
    **{name: name for name in RESULTS},
    "examples/README.md": "examples/index.md",
    **{f"examples/{name}.py": f"examples/{name}.md" for name in EXAMPLES},
    **{f"examples/reading/{name}.py": f"examples/reading/{name}.md" for name in READING},
    **{f"examples/notebook/{name}.ipynb": f"examples/notebook/{name}.md" for name in NOTEBOOKS},
}
UNSEARCHED = {"changelog.md", "benchmarks_notes.md"}  # they name everything, and explain nothing
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?\)")
# latex2mathml writes \mathrm{d} as the code of its letter, which is shown italic like d, and the
# letters of \mathrm{val} one by one.
ROMAN = re.compile(r"<mi>(&#x000[4-7][0-9A-F];)</mi>")
LETTER = r'<mi mathvariant="{}">[^<]+</mi>'
WORD = re.compile(LETTER.format("(normal|monospace)") + "(?:" + LETTER.format(r"\1") + ")+")
PICTURE = re.compile(r'<p>(<img [^>]*src="((?!data:)[^"]+)"[^>]*>)</p>')  # for a link
PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.DOTALL)
CELL = re.compile(r"<td([^>]*)>([-+<>~.]{0,2}\d[^<]{0,22})</td>")  # with a number and its interval
NO_BREAK = "&nbsp;"
CODE = re.compile(r"(<(pre|code|math)\b.*?</\2>)", re.DOTALL)
UNIT = re.compile(r"(?<=\d) (?=[%×])")
# Indented: a result that ends in a time is not.
PROGRESS = re.compile(r"(?:seed|split) \d.*|  \S.*: \d+ s|pictures? in .*")
TIMED = re.compile(r" \(\d+ s\)$")
LONG = 60  # lines of output that hide the program
DESCRIPTION = 160  # characters: a search engine cuts the rest
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The version, and the addresses that pyproject.toml has, if it has any."""
    config.site_name = f"{config.site_name} {__version__}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    addresses = project.get("urls", {})
    if not config.site_url and "Documentation" in addresses:
        config.site_url = addresses["Documentation"].rstrip("/") + "/"
    config.repo_url = config.repo_url or addresses.get("Repository")
    if config.repo_url:
        config.repo_name = config.repo_name or project["name"]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        if source == "examples/README.md":
            text = text.split("\n## ")[0] + "\n"
        elif source.startswith("examples/reading/"):
            text = _reading(source, text)
        elif source.endswith(".ipynb"):
            text = _notebook(source, text)
        elif source.startswith("examples/"):
            text = _example(source, text)
        files.append(File.generated(config, page, content=_relinked(text, source, page)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.generated_by:  # its links already point to pages
        return markdown
    return _relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    description = "" if page.is_homepage else _description(content)
    page.meta.setdefault("description", description or config.site_description)
    if page.file.src_uri in UNSEARCHED:
        page.meta["search"] = {"exclude": True}
    content = PICTURE.sub(r'<p><a href="\2">\1</a></p>', content)
    content = CELL.sub(_on_one_line, FORMULA.sub(_mathml, content))
    parts = CODE.split(content)  # text, code, its tag, text, ...
    parts[::3] = [UNIT.sub(NO_BREAK, text) for text in parts[::3]]
    del parts[2::3]
    return "".join(parts)


def _description(content: str) -> str:
    """The first paragraph of a page that is text, without markup: its first sentences, or words."""
    for paragraph in PARAGRAPH.findall(content):
        text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", paragraph)).split())
        if text and not FORMULA.search(paragraph):
            short = textwrap.shorten(text, DESCRIPTION, placeholder=" ...")
            sentences = re.match(r".+\.(?=\s|$)", short.removesuffix(" ..."))
            return html.escape(sentences[0] if sentences else short)
    return ""


def _on_one_line(found: re.Match[str]) -> str:
    return f"<td{found[1]}>{found[2].replace(' ', NO_BREAK)}</td>"


def _mathml(found: re.Match[str]) -> str:
    formula, inline = html.unescape(found[2]).strip()[2:-2], found[1] == "span"
    formula = formula.replace(r"\operatorname{", r"\mathrm{")  # italic otherwise
    written = converter.convert(formula, display="inline" if inline else "block")
    written = ROMAN.sub(lambda x: f'<mi mathvariant="normal">{html.unescape(x[1])}</mi>', written)
    written = WORD.sub(lambda x: f'<mi class="{x[1]}">{re.sub("<[^>]+>", "", x[0])}</mi>', written)
    if "<mi>\\" in written:
        raise PluginError(f"a command that latex2mathml does not know in {formula}")
    return written if inline else f'<div class="formula">{written}</div>'


def _relinked(text: str, source: str, page: str) -> str:
    """Turns links between files of the repository, relative to `source`, into links from `page`."""

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        target = PAGES.get(target, target.removeprefix("docs/"))
        target = posixpath.relpath(target, posixpath.dirname(page) or ".")
        return f"{found[1]}{target}{found[3] or ''})"

    return LINK.sub(link, text)


def _example(source: str, code: str) -> str:
    """The page of an example: its picture and result, the problem, and the program itself."""
    name = Path(source).stem
    title, about = (ast.get_docstring(ast.parse(code)) or "").split("\n", 1)
    results = (ROOT / "examples" / "README.md").read_text().split("\n## ")[1:]
    link = f"[`{name}.py`]({name}.py)"
    heading, found = next((x.split("\n", 1) for x in results if link in x), ("", ""))
    if not found:
        heading, *rest = re.split(r"(?<=\?) |: ", title.removesuffix("."), maxsplit=1)
        title = "".join(f"{x[0].upper()}{x[1:]}." for x in rest)
    pictures, printed = _results(name, "..")
    parts = [
        f"# {heading}",
        f"*{title}*" if title else "",
        pictures,
        found.replace(link, ""),
        _folded(printed) if found or printed.count("\n") > LONG else printed,
        f"## The problem\n\n{about}",
        f"## The program {{ data-search-exclude }}\n\n`{source}`\n\n```py\n{code}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(name: str, root: str) -> tuple[str, str]:
    """The pictures and the output of a script, as docs/figures.py saved them."""
    images = ROOT / "docs" / "images"
    pictures = [f"{name}.png", *sorted(path.name for path in images.glob(f"{name}_*.png"))]
    shown = [
        f"![The program's picture]({root}/docs/images/{picture})"
        for picture in pictures
        if (images / picture).exists()
    ]
    printed = images / f"{name}.txt"
    return "\n\n".join(shown), _printed(printed.read_text()) if printed.exists() else ""


def _folded(printed: str) -> str:
    return '??? note "What it prints"\n\n' + textwrap.indent(printed, "    ")


def _printed(text: str) -> str:
    """The output of a program without its progress: tables as tables, the rest verbatim."""
    blocks = [_without_progress(block.splitlines()) for block in text.split("\n\n")]
    lines = [line for block in blocks if block for line in (*block, "")]
    parts = []
    for is_table, group in itertools.groupby(lines, lambda x: x.startswith("|")):
        block = "\n".join(group).strip("\n")
        parts.append(block if is_table else f"```text\n{block}\n```" if block else "")
    return "\n\n".join(part for part in parts if part)


def _without_progress(block: list[str]) -> list[str]:
    """Without what reports progress; of what comes again with each report, the first copy."""
    kept = [TIMED.sub("", line) for line in block if not PROGRESS.fullmatch(line)]
    return kept if len(kept) == len(block) else list(dict.fromkeys(kept))


def _reading(source: str, code: str) -> str:
    """A script in cells as a page: its texts, with its code between them."""
    parts = []
    for cell in re.split(r"^# %%", code, flags=re.MULTILINE)[1:]:
        head, body = cell.split("\n", 1)
        if "[markdown]" in head:
            parts.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        else:
            parts.append(f"```py\n{body.strip()}\n```")
    pictures, printed = _results(Path(source).stem, "../..")
    parts += [pictures, f"## Output\n\n{printed}", f"*The script: `{source}`*"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _notebook(source: str, text: str) -> str:
    """A notebook as a page: its cells, and what they printed or drew.

    A cell with a picture describes it in its metadata (`# %% alt="..."` in the script).
    """
    parts = []
    for cell in json.loads(text)["cells"]:
        written = "".join(cell["source"])
        parts.append(written if cell["cell_type"] == "markdown" else f"```py\n{written}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                alt = cell["metadata"]["alt"]
                parts.append(f"![{alt}](data:image/png;base64,{picture})")
            elif output.get("name") != "stderr":  # where progress is shown
                printed = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join([*parts, f"*The notebook: `{source}`*"]) + "\n"
