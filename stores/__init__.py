"""What a run looks like on disk and in memory: format `interp.run/1`. Knows nothing of models.

```python
from interp.stores import open_run, synthetic_run
run = open_run("run.zarr")          # lazy; run.tree is an ordinary xr.DataTree
run = synthetic_run(samples=4)      # a run to try things on, without a model
```

Names are imported from their homes when they are first used (PEP 562): what writes runs needs no xarray.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "create_run": "interp.stores.create",
    "InterpError": "interp.stores.errors",
    "StoreError": "interp.stores.errors",
    "attention_group": "interp.stores.groups",
    "images_group": "interp.stores.groups",
    "site_group": "interp.stores.groups",
    "text_group": "interp.stores.groups",
    "trajectory_group": "interp.stores.groups",
    "verify": "interp.stores.integrity",
    "open_run": "interp.stores.opening",
    "Run": "interp.stores.reader",
    "Array": "interp.stores.schema",
    "Group": "interp.stores.schema",
    "Layout": "interp.stores.schema",
    "TokenTable": "interp.stores.schema",
    "synthetic_run": "interp.stores.synthetic",
    "DONE": "interp.stores.table",
    "FAILED": "interp.stores.table",
    "FORMAT": "interp.stores.table",
    "TABLE": "interp.stores.table",
    "TODO": "interp.stores.table",
    "validate": "interp.stores.validation",
    "RunWriter": "interp.stores.writer",
    "to_do": "interp.stores.writer",
}

__all__ = [
    "DONE",
    "FAILED",
    "FORMAT",
    "TABLE",
    "TODO",
    "Array",
    "Group",
    "InterpError",
    "Layout",
    "Run",
    "RunWriter",
    "StoreError",
    "TokenTable",
    "attention_group",
    "create_run",
    "images_group",
    "open_run",
    "site_group",
    "synthetic_run",
    "text_group",
    "to_do",
    "trajectory_group",
    "validate",
    "verify",
]

if TYPE_CHECKING:
    from interp.stores.create import create_run as create_run
    from interp.stores.errors import InterpError as InterpError
    from interp.stores.errors import StoreError as StoreError
    from interp.stores.groups import attention_group as attention_group
    from interp.stores.groups import images_group as images_group
    from interp.stores.groups import site_group as site_group
    from interp.stores.groups import text_group as text_group
    from interp.stores.groups import trajectory_group as trajectory_group
    from interp.stores.integrity import verify as verify
    from interp.stores.opening import open_run as open_run
    from interp.stores.reader import Run as Run
    from interp.stores.schema import Array as Array
    from interp.stores.schema import Group as Group
    from interp.stores.schema import Layout as Layout
    from interp.stores.schema import TokenTable as TokenTable
    from interp.stores.synthetic import synthetic_run as synthetic_run
    from interp.stores.table import DONE as DONE
    from interp.stores.table import FAILED as FAILED
    from interp.stores.table import FORMAT as FORMAT
    from interp.stores.table import TABLE as TABLE
    from interp.stores.table import TODO as TODO
    from interp.stores.validation import validate as validate
    from interp.stores.writer import RunWriter as RunWriter
    from interp.stores.writer import to_do as to_do
else:

    def __getattr__(name: str) -> object:
        if name in _HOME:
            return getattr(import_module(_HOME[name]), name)
        raise AttributeError(f"module 'interp.stores' has no attribute {name!r}; it has: {', '.join(sorted(_HOME))}")

    def __dir__() -> list[str]:
        return sorted(__all__)
