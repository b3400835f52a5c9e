"""What a run looks like on disk and in memory: format `interp.run/1`. Knows nothing of models.

```python
from interp.stores import open_run, synthetic_run
run = open_run("run.zarr")          # lazy; run.tree is an ordinary xr.DataTree
run = synthetic_run(samples=4)      # a run to try things on, without a model
```
"""

from interp.stores.create import create_run
from interp.stores.errors import InterpError, StoreError
from interp.stores.groups import attention_group, images_group, site_group, text_group, trajectory_group
from interp.stores.integrity import verify
from interp.stores.opening import open_run
from interp.stores.reader import Run
from interp.stores.schema import Array, Group, Layout, TokenTable
from interp.stores.synthetic import synthetic_run
from interp.stores.table import DONE, FAILED, FORMAT, TABLE, TODO
from interp.stores.validation import validate
from interp.stores.writer import RunWriter, to_do

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
