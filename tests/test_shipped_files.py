"""The check of the shipped files passes on this repository and sees each fault that was planted."""

import shutil

import pytest

from tests import check_shipped_files
from tests.check_shipped_files import ENTRY, PACKAGE, shipped_files, violations

FAULTS = {
    "package": ("from . import cache", "only `from .sibling import name`"),
    "parent": ("from ..tools import x", "only `from .sibling import name`"),
    "folder": ("from .ops.gla import x", "only `from .sibling import name`"),
    "missing": ("from .nowhere import x", "there is no nowhere.py"),
    "two on a line": ("import math; from .suite import cell_config", "not where a line begins"),
    "docstring": (
        'def f():\n    """Take it\n    from .cache_layer import it.\n    """',
        "reads as an import of .cache_layer",
    ),
    "third party": ("import triton", "put it inside try:"),
    "third party in a function": ("def f():\n    from fla.ops import gla", "put it inside try:"),
    "behind a test": ("if True:\n    import flash_attn", "put it inside try:"),
    "absolute": (
        "try:\n    from hybrid_models import cache\nexcept ImportError:\n    pass",
        "imports hybrid_models absolutely",
    ),
    "isinstance": (
        "def f(config):\n    return isinstance(config, (int, HybridLinearConfig))",
        "two copies of that class",
    ),
    "register": ("AutoConfig.register('hybrid_linear', object)", "registers an Auto class"),
    "hidden": ("import importlib\nimportlib.import_module('fla')", "hides an import"),
}


@pytest.fixture
def package(tmp_path):
    copy = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_this_repository_keeps_the_rules(capsys):
    assert check_shipped_files.main() == 0, capsys.readouterr().out
    names = {path.name for path in shipped_files()}
    assert {ENTRY, "cache.py", "configuration_hybrid_linear.py", "mixers.py", "recurrence.py"} <= names
    assert not names & {"cli.py", "info.py", "__init__.py"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(package, fault):
    code, message = FAULTS[fault]
    path = package / "mixers.py"  # not the entry: the check follows the imports
    path.write_text(path.read_text() + "\n" + code + "\n")
    found = violations(package)
    assert any(message in line for line in found), found


def test_a_try_block_excuses_an_optional_package(package):
    path = package / "mixers.py"
    path.write_text(path.read_text() + "\ntry:\n    import triton\nexcept ImportError:\n    triton = None\n")
    assert violations(package) == []


def test_a_sub_package_is_seen(package):
    (package / "ops").mkdir()
    (package / "ops" / "gla.py").touch()
    assert any("sub-package" in line for line in violations(package))


def test_files_that_do_not_travel_are_free(package):
    path = package / "cli.py"
    path.write_text(path.read_text() + "\nimport rich\n")
    assert violations(package) == []
