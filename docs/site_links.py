"""For mkdocs: documents of the project's root as pages, and links to files of the project that a site can follow.

On a page, a link is relative to its file, as on a forge. A file of the project that is no page becomes one of the
site's own files; a link to a folder, or to a document that is no page, becomes its text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {f"{name}.md": f"{name.lower()}.md" for name in ("ARCHITECTURE", "BENCHMARKS", "CONTRIBUTING", "SECURITY")}
ROOT_PAGES |= {"README.md": "index.md", "helm/moe-cluster/README.md": "chart.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the root's documents."""
    for name, uri in ROOT_PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Gives each link of a page the place where its target is on the site."""
    sources = {uri: name for name, uri in ROOT_PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def on_site(found: re.Match[str]) -> str:
        image, text, link, anchor = found.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        uri = ROOT_PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}")
        if uri.startswith("files/") and files.get_file_from_path(uri) is None:
            if target.endswith(".md") or not (ROOT / target).is_file():
                return text
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
        return f"{image}[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{anchor or ''})"

    return LINK.sub(on_site, markdown)
