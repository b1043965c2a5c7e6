import importlib
import subprocess
import sys

import pytest

from phyla.bench import systems


def test_every_system_names_things_that_exist_in_its_package():
    found = systems.systems()
    assert {"kan_family", "linear_rnn", "quantized"} <= {system.package for system in found}
    for system in found:
        package = importlib.import_module(f"phyla.{system.package}")
        assert system.name
        assert system.paper
        for name in system.entry_points:
            assert hasattr(package, name), f"phyla.{system.package}._systems: {name} is not in the package"


def test_listing_does_not_import_torch():
    code = "import sys; from phyla.bench.systems import systems; assert systems(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("text", ["", "SYSTEMS = []", "SYSTEMS = (('a', 'b'),)", "SYSTEMS = (('a', 'b', 3),)"])
def test_a_malformed_table_is_named(tmp_path, monkeypatch, text):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "__init__.py").write_text("")
    (tmp_path / "odd" / "_systems.py").write_text(text)
    monkeypatch.setattr(systems.phyla, "__path__", [str(tmp_path)])
    with pytest.raises(ValueError, match=r"phyla\.odd\._systems: expected SYSTEMS"):
        systems.systems()


def test_a_package_without_a_table_is_fine(tmp_path, monkeypatch):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "__init__.py").write_text("raise RuntimeError('listing must not import me')")
    monkeypatch.setattr(systems.phyla, "__path__", [str(tmp_path)])
    assert systems.packages() == ("plain",)
    assert systems.systems() == ()
    assert systems.version("plain") == "unknown"
