import doctest
import importlib
import inspect
import pkgutil

import pytest

import interp.probes
from interp.probes import Probe

MODULES = [
    "interp.probes",
    *(f"interp.probes.{m.name}" for m in pkgutil.iter_modules(interp.probes.__path__)),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_probes_have_examples_that_doctest_sees(name):
    module = importlib.import_module(name)
    examples = {t.name.rpartition(".")[2]: t for t in doctest.DocTestFinder().find(module) if t.examples}
    for key, value in vars(module).items():
        if isinstance(value, Probe) and value.__module__ == name:
            assert key in examples, f"{name}.{key} has no example"


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_documented_and_modules_are_short(name):
    module = importlib.import_module(name)
    assert len(inspect.getsource(module).splitlines()) <= 300
    for key, value in vars(module).items():
        public = not key.startswith("_") and getattr(value, "__module__", None) == name
        assert not public or inspect.getdoc(value), f"{name}.{key} has no docstring"
