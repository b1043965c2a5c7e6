"""The report as a reader gets it: parsed always, and opened in a real browser where one is installed."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from phyla.bench import read_run, report

VOID = {"meta", "link", "br", "hr", "img", "input"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

MEASURE = """
const show = svg => {
  const box = svg.getBoundingClientRect();
  return [box.width, box.height, svg.querySelectorAll('path, use').length].map(Math.round).join('x');
};
document.body.dataset.shown = [...document.querySelectorAll('svg')].map(show).join(' ');
document.body.dataset.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
"""


class Page(HTMLParser):
    """Collects what the checks need; a tag that closes nothing, or nothing closed, is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.text = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture
def path(phyla, folder):
    """The report of a run with a good and a failing pipeline, made once."""
    if not (folder / "report.html").exists():
        phyla("run", "good", "broken", "--out", folder)
    return folder / "report.html"


def test_well_formed_complete_and_self_contained(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 3  # two boards, one chart
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    for reference in page.references:
        assert reference == "data:," or reference.strip("'\"").startswith("#")
        assert reference == "data:," or reference.strip("'\"")[1:] in page.ids
    assert "@import" not in text
    assert re.findall(r"https?://[^\s\"']+", text.replace("http://www.w3.org/", "")) == []
    words = " ".join("".join(page.text).split())
    for word in (
        "new <model>",
        "x < 1 & y",
        "Second paragraph.",
        "ArithmeticError: the sum does not add up",
        "torch",
        "Kernels",
        "seeds 0, 1",
    ):
        assert word in words
    assert "@page { size: A4" in text


def test_rendering_is_deterministic(path):
    run = read_run(path.with_name("results.json"))
    assert report.render(run) == report.render(run) == path.read_text(encoding="utf-8")


def test_text_in_plots_is_text_and_large_enough(path):
    text = path.read_text(encoding="utf-8")
    sizes = [float(size) for size in re.findall(r"<text style=\"font-size: ([\d.]+)px", text)]
    assert len(sizes) > 20
    assert min(sizes) >= 7  # exponents of axis labels


def browse(folder, *arguments):
    quiet = (
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-extensions",
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", *(f"--{flag}" for flag in quiet)]
    done = subprocess.run([BROWSER, *flags, "--enable-logging=stderr", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


if BROWSER:

    def test_opens_in_a_browser_without_a_console_error_and_its_plots_show(path, tmp_path):
        probe = f"<script>{MEASURE}</script>"
        page = tmp_path / "probe.html"
        page.write_text(path.read_text(encoding="utf-8").replace("</body>", probe + "</body>"), encoding="utf-8")
        dom = browse(tmp_path, "--window-size=1100,1400", "--dump-dom", page.as_uri())
        shown = re.search(r'data-shown="([^"]*)"', dom).group(1).split()
        assert len(shown) == 3
        for each in shown:
            width, height, shapes = map(int, each.split("x"))
            assert width > 600
            assert height > 60
            assert shapes > 10
        assert re.search(r'data-overflow="(-?\d+)"', dom).group(1) == "0"

    def test_prints_on_a4(path, tmp_path):
        pdf = tmp_path / "report.pdf"
        browse(tmp_path, f"--print-to-pdf={pdf}", "--no-pdf-header-footer", path.as_uri())
        boxes = {tuple(round(float(each)) for each in box.split()) for box in re.findall(rb"/MediaBox \[([^\]]*)\]", pdf.read_bytes())}
        assert boxes == {(0, 0, 595, 842)}
