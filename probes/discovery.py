"""Finding plugins (probes, interventions, families): installed entry points of a group, and plain files.

Listing reads metadata and source text only and imports nothing; loading a plain file executes it.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from interp.probes.base import FILE_MODULE, Probe
from interp.stores.errors import InterpError, nearest

PROBES = "interp.probes"
OURS = "interp-diffusion"


@dataclass(frozen=True)
class Plugin:
    """An installed entry point: its name, `module:object`, and the distribution that brings it."""

    name: str
    target: str
    distribution: str
    group: str

    def load(self) -> Any:
        """Import and return the object; raises InterpError naming the distribution when that fails."""
        try:
            return EntryPoint(self.name, self.target, self.group).load()
        except (Exception, SystemExit) as error:  # a plugin may fail in any way
            raise InterpError(f"{self} cannot be loaded: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.target}) of {self.distribution}"


@dataclass(frozen=True)
class PluginInfo:
    """One line of a listing: the name, the docstring's first line, and where the plugin comes from."""

    name: str
    summary: str
    source: str


def plugins(group: str) -> list[Plugin]:
    """Return the installed plugins of an entry-point group, sorted by name; imports none of them.

    >>> [p.name for p in plugins("interp.probes") if p.target.startswith("interp.probes.eos")]
    ['eos_replacement']
    """
    return list(_plugins(group, _places()))


def _places() -> tuple[tuple[str, int], ...]:
    """Where distributions are looked for, and when something was last installed or removed there."""
    return tuple((name, place.stat().st_mtime_ns) for name in sys.path if (place := Path(name)).is_dir())


@lru_cache(maxsize=64)
def _plugins(group: str, places: tuple[tuple[str, int], ...]) -> tuple[Plugin, ...]:
    """Read every distribution's metadata, also for its name, which takes 10 ms: once, until `places` change."""
    found = {
        Plugin(e.name, e.value, e.dist.name if e.dist else "an unknown distribution", group)
        for e in entry_points(group=group)
    }
    return tuple(sorted(found, key=lambda p: (p.name, p.distribution, p.target)))


def find_plugin(name: str, group: str) -> Any:
    """Import and return the plugin `name` of a group.

    Raises InterpError for an unknown name (with the nearest and the list), for a name that two distributions
    claim, and for a plugin that cannot be imported. Other plugins, broken or not, play no part.
    """
    everything = plugins(group)
    matches = [p for p in everything if p.name == name]
    if len(matches) == 1:
        return matches[0].load()
    kind = re.sub("(ie)?s$", lambda end: "y" if end[1] else "", group.rpartition(".")[2])
    if matches:
        raise InterpError(f"two plugins are called {name!r}: {' and '.join(map(str, matches))}; uninstall one")
    names = sorted({p.name for p in everything})
    listed = f"installed: {', '.join(names)}" if names else "none is installed (pip install -e . installs ours)"
    raise InterpError(f"no {kind} named {name!r}; {listed}{nearest(name, names)}")


def load_plugins(group: str, kind: type | None = None) -> dict[str, Any]:
    """Import every plugin of a group: name → object. A broken one is a warning naming it, and left out.

    kind: the class that all must be subclasses of. Of several with one name, which cannot be told apart, ours stays.
    """
    loaded: dict[str, Any] = {}
    everything = plugins(group)
    for plugin in everything:
        rivals = [p for p in everything if p.name == plugin.name and p != plugin]
        try:
            if rivals and plugin.distribution != OURS:
                raise InterpError(f"two plugins are called {plugin.name!r}: {plugin} and {rivals[0]}; uninstall one")
            found = plugin.load()
            if kind is not None and not (isinstance(found, type) and issubclass(found, kind)):
                raise InterpError(f"{plugin} is {what_is(found)}, no subclass of {kind.__name__}")
            loaded[plugin.name] = found
        except InterpError as error:
            warnings.warn(f"{error}; it is left out", RuntimeWarning, stacklevel=2)
    return loaded


def what_is(found: Any) -> str:
    """Say what an object is that should have been something else.

    >>> what_is(3), what_is(Plugin)
    ('an object of type int', 'the class Plugin')
    """
    return f"the class {found.__name__}" if isinstance(found, type) else f"an object of type {type(found).__name__}"


def load_file(path: str | Path) -> ModuleType:
    """Execute a Python file as a module of a private name and return it; reused until the file changes.

    Raises InterpError when the file does not exist or fails.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise InterpError(f"no such file: {str(path)!r}")
    name = f"{FILE_MODULE}{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    stamp = (file.stat().st_mtime_ns, file.stat().st_size)
    if name in sys.modules and sys.modules[name].__dict__.get("__stamp__") == stamp:
        return sys.modules[name]
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InterpError(f"{str(path)!r} is not a Python file")
    module = module_from_spec(spec)
    module.__dict__["__stamp__"] = stamp
    sys.modules[name] = module  # before execution: dataclasses and pickling look it up there
    try:
        # Compiled here: the import system's cache would miss an edit within the same second.
        exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InterpError(f"{str(path)!r} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def find_probe(name: str | Path | Probe) -> Probe:
    """Return an installed probe by name, or one of a plain file by `"my_probe.py"` or `"my_probe.py:name"`.

    Raises InterpError for an unknown name (with the nearest and the list), two plugins of one name, a plugin
    or file that fails, and a file with no probe or with several and none named. Loading a file executes it.
    A Probe is returned as it is.

    >>> find_probe("attention_mass").name
    'attention_mass'
    """
    if isinstance(name, Probe):
        return name
    name = str(name)
    file, _, wanted = name.rpartition(":") if ".py:" in name else (name, "", "")
    if file.endswith(".py"):
        return _probe_of_file(file, wanted)
    found = find_plugin(name, PROBES)
    if not isinstance(found, Probe):
        raise InterpError(f"plugin {name!r} is {what_is(found)}, not a probe: mark the function with @probe({name!r})")
    if found.name != name:
        raise InterpError(f"plugin {name!r} is a probe called {found.name!r}: give both the same name")
    return found


def list_probes() -> list[PluginInfo]:
    """Return name, summary and source of every installed probe, sorted by name; imports none of them.

    >>> [info.name for info in list_probes() if "interp.probes.frequency" in info.source]
    ['frequency_energy']
    """
    return list_plugins(PROBES)


def list_plugins(group: str) -> list[PluginInfo]:
    """Return name, summary and source of every plugin of a group, sorted by name; imports none of them.

    >>> [info.name for info in list_plugins("interp.probes")][:2]
    ['acceleration', 'attention_convergence']
    """
    return [PluginInfo(p.name, _summary(p.target), f"{p.target} of {p.distribution}") for p in plugins(group)]


def loaded_probe(name: str) -> Probe | None:
    """Return a probe of that name from the plain files loaded so far, if there is one."""
    modules = [m for key, m in sys.modules.items() if key.startswith(FILE_MODULE)]
    return next((p for m in modules for p in _probes_in(m) if p.name == name), None)


def _probes_in(module: ModuleType) -> Iterator[Probe]:
    """The probes defined in a module, not those it imports."""
    seen: set[int] = set()
    for value in list(vars(module).values()):
        if isinstance(value, Probe) and value.fn.__module__ == module.__name__ and id(value) not in seen:
            seen.add(id(value))
            yield value


def _probe_of_file(file: str, wanted: str) -> Probe:
    probes = {p.name: p for p in _probes_in(load_file(file))}
    if wanted:
        if wanted not in probes:
            listed = ", ".join(probes) or "none"
            raise InterpError(f"{file!r} has no probe named {wanted!r}; it has {listed}{nearest(wanted, probes)}")
        return probes[wanted]
    if len(probes) == 1:
        return next(iter(probes.values()))
    if not probes:
        raise InterpError(f'{file!r} has no probe: write @probe("{Path(file).stem}") above a function of a run')
    raise InterpError(f"{file!r} has several probes: ask for one of {', '.join(f'{file}:{n}' for n in probes)}")


def _summary(target: str) -> str:
    """The first docstring line of `module:object`, read from the source text without importing anything."""
    module, _, name = target.partition(":")
    spec = _find_spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return ""
    try:
        body = ast.parse(Path(spec.origin).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return ""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _find_spec(module: str) -> ModuleSpec | None:
    """Like importlib.util.find_spec, which would import the parent packages."""
    path = None
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        finders = [f for f in sys.meta_path if hasattr(f, "find_spec")]
        spec = next((s for f in finders if (s := f.find_spec(name, path))), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec
