"""Batch jobs: thousands of samples from one file, resumable at any moment, on any number of processes.

```python
from interp.jobs import read_job, run_job
report = run_job(read_job("job.yaml"), workers=2)
```

Names are imported from their homes when they are first used (PEP 562): a worker needs neither the driver nor the parser.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "Report": "interp.jobs.driver",
    "run_job": "interp.jobs.driver",
    "Job": "interp.jobs.spec",
    "job_schema": "interp.jobs.spec",
    "read_job": "interp.jobs.spec",
}

__all__ = ["Job", "Report", "job_schema", "read_job", "run_job"]

if TYPE_CHECKING:
    from interp.jobs.driver import Report as Report
    from interp.jobs.driver import run_job as run_job
    from interp.jobs.spec import Job as Job
    from interp.jobs.spec import job_schema as job_schema
    from interp.jobs.spec import read_job as read_job
else:

    def __getattr__(name: str) -> object:
        if name in _HOME:
            return getattr(import_module(_HOME[name]), name)
        raise AttributeError(f"module 'interp.jobs' has no attribute {name!r}; it has: {', '.join(sorted(_HOME))}")

    def __dir__() -> list[str]:
        return sorted(__all__)
