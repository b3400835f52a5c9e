"""Batch jobs: thousands of samples from one file, resumable at any moment, on any number of processes.

```python
from interp.jobs import read_job, run_job
report = run_job(read_job("job.yaml"), workers=2)
```
"""

from interp.jobs.driver import Report, run_job
from interp.jobs.spec import Job, job_schema, read_job

__all__ = ["Job", "Report", "job_schema", "read_job", "run_job"]
