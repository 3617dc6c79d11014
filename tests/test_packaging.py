"""What is installed, and whether the tested versions satisfy what setup.cfg asks for."""

import configparser
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import hybrid_models

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.strip().splitlines()]


def test_an_installation_holds_only_the_library(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"  # a copy, so that no build folder is left in the checkout
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "runs")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--no-index", "--target", target, source], check=True, text=True)

    modules = {path.name for path in target.iterdir() if path.suffix != ".dist-info"}
    assert modules == {"hybrid_models", "bin"}
    assert {path.name for path in (target / "bin").iterdir()} == {"hybrid-linear"}
    installed = {path.name for path in (target / "hybrid_models").glob("*.py")}
    assert installed == {path.name for path in (ROOT / "hybrid_models").glob("*.py")}
    (metadata,) = target.glob("*.dist-info/METADATA")
    assert f"Version: {hybrid_models.__version__}\n" in metadata.read_text()


def test_the_tested_versions_satisfy_setup_cfg(setup_cfg):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = Version(version)
    assert pins["torch"] == Version("2.13.0")
    extras = setup_cfg["options.extras_require"]
    wanted = [*requirements(setup_cfg["options"]["install_requires"])]
    wanted += [requirement for extra in ("train", "dev") for requirement in requirements(extras[extra])]
    for requirement in wanted:
        assert canonicalize_name(requirement.name) in pins, f"{requirement} has no pin in constraints.txt"
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_this_environment_satisfies_setup_cfg(setup_cfg):
    for requirement in requirements(setup_cfg["options"]["install_requires"]):
        assert Version(version(requirement.name)) in requirement.specifier, requirement


def test_every_extra_of_the_design_is_there(setup_cfg):
    assert set(setup_cfg["options.extras_require"]) == {"gpu", "train", "eval", "upload", "dev"}
    assert "packages = hybrid_models\n" in (ROOT / "setup.cfg").read_text()
