"""The rules of the house, held for every package that has a pyproject.toml."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

import phyla

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "shared", *sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))]
SEVERAL = {"bench"}  # the one package that may import others

every_package = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def imported_packages(file: Path) -> set[str]:
    """The x of every `phyla.x` that a file imports, in whichever way."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=str(module), names=aliases, level=0):
                names |= {f"{module}.{alias.name}" for alias in aliases}
            case ast.Call(func=ast.Name(id="__import__") | ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]):
                names.add(module)
    return {name.split(".")[1] for name in names if name.startswith("phyla.")}


@every_package
def test_a_package_imports_shared_and_itself_only(folder: Path) -> None:
    own = folder.name.replace("-", "_")
    allowed = {own} if own == "shared" else {own, "shared"}
    for file in folder.rglob("*.py"):
        foreign = imported_packages(file) - allowed - {"selftest"}
        assert own in SEVERAL or not foreign, f"{file.relative_to(ROOT)} imports {sorted(foreign)}"


@every_package
def test_a_package_depends_on_shared_only(folder: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    required = {match[0] for line in project["dependencies"] if (match := re.match(r"phyla-[\w-]+", line))}
    assert project["name"] == f"phyla-{folder.name}"
    assert folder.name in SEVERAL or required == ({"phyla-shared"} if folder.name != "shared" else set())


def test_phyla_is_a_namespace() -> None:
    assert phyla.__file__ is None
    assert not list(ROOT.glob("*/src/phyla/__init__.py")) + list(ROOT.glob("packages/*/src/phyla/__init__.py"))


@every_package
def test_a_package_is_complete(folder: Path) -> None:
    source = folder / "src" / "phyla" / folder.name.replace("-", "_")
    for file in (folder / "README.md", folder / "CHANGELOG.md", folder / "LICENSE", source / "py.typed", source / "__init__.py"):
        assert file.is_file(), file
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert [path.name for path in (folder / "src" / "phyla").iterdir() if path.name != "__pycache__"] == [source.name]
    assert f"phyla-{folder.name}" in (ROOT / "README.md").read_text()


@every_package
def test_an_installed_package_carries_its_license_and_types(folder: Path) -> None:
    installed = distribution(f"phyla-{folder.name}")
    names = {file.name for file in installed.files or [] if file.parts[0].endswith(".dist-info")}
    assert "LICENSE" in names
    module = importlib.import_module(f"phyla.{folder.name.replace('-', '_')}")
    assert module.__file__ is not None
    assert (Path(module.__file__).parent / "py.typed").is_file()
    changes = (folder / "CHANGELOG.md").read_text()
    assert f"## {installed.version}" in changes


@every_package
def test_public_names_exist_and_are_documented(folder: Path) -> None:
    module = importlib.import_module(f"phyla.{folder.name.replace('-', '_')}")
    for name in getattr(module, "__all__", []):
        public = getattr(module, name)
        assert not callable(public) or public.__doc__, f"{module.__name__}.{name} has no docstring"


@every_package
def test_the_readme_runs(folder: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_file_is_longer_than_a_reader_bears() -> None:
    for folder in FOLDERS:
        for file in [*folder.glob("src/**/*.py"), *folder.glob("src/**/*.cpp"), *folder.glob("src/**/*.h")]:
            assert len(file.read_text().splitlines()) <= 500, f"{file.relative_to(ROOT)} is longer than 500 lines"


def code_lines(file: Path) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    tree = ast.parse(file.read_text())
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    told = {line for node in texts for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    lines = enumerate(file.read_text().splitlines(), 1)
    return sum(bool(text.strip()) and not text.lstrip().startswith("#") and number not in told for number, text in lines)


def test_shared_stays_thin() -> None:
    lines = sum(code_lines(file) for file in (ROOT / "shared" / "src").rglob("*.py"))
    assert lines < 1000, f"phyla.shared holds {lines} lines of code"
