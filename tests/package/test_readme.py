"""What README and the pages of docs show runs as it stands, prints something, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import ROOT, child_environment

PACKAGES = ("torch", "transformers", "matplotlib")
PAGES = sorted(Path(ROOT, "docs").glob("*.md"))


def blocks(path: Path) -> list[str]:
    """The blocks of Python in a page."""
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.M | re.S)


def missing(code: str) -> list[str]:
    """The packages that some lines import and that are not installed."""
    named = [name for name in PACKAGES if re.search(rf"^(import|from) {name}\b", code, re.M)]
    return [name for name in named if importlib.util.find_spec(name) is None]


def run(code: str, folder: Path) -> str:
    """What a program prints that is started in an empty folder."""
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code]
    done = subprocess.run(command, cwd=folder, env=child_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    assert list(folder.iterdir()) == [], "it leaves files behind"
    return done.stdout


README = blocks(Path(ROOT, "README.md"))


def title(block: str) -> str:
    """The line of README that says what a block is for, without its marks."""
    before = Path(ROOT, "README.md").read_text().split(block)[0].rstrip().removesuffix("```python").rstrip()
    return re.sub(r"[*:,.]", "", " ".join(before.splitlines()[-1].split()[:3]))


@pytest.mark.parametrize("block", README, ids=[title(block) for block in README])
def test_readme(block: str, tmp_path: Path) -> None:
    if missing(block):
        pytest.skip(f"{' and '.join(missing(block))} is not installed")
    assert run(block, tmp_path).strip()


def test_readme_is_short() -> None:
    assert len(Path(ROOT, "README.md").read_text().splitlines()) <= 180
    assert len(README) >= 9
    for block in README:
        assert 4 <= len([line for line in block.splitlines() if line]) <= 8, block


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_pages(page: Path, tmp_path: Path) -> None:
    """The blocks of a page in one program; those that need what is not installed are left out."""
    run("\n".join(block for block in blocks(page) if not missing(block)), tmp_path)


@pytest.mark.parametrize("page", [Path(ROOT, "README.md"), *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    gone = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not gone
    assert links
