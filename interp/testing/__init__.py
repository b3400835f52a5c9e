"""For authors of model families: `check_family` yields the checks that every family passes.

```python
import pytest
from interp.testing import check_family
from my_pipelines import tiny_pipeline          # a few layers with random weights, built from configs

@pytest.mark.parametrize("check", list(check_family(tiny_pipeline, options={"max_sequence_length": 32})), ids=str)
def test_my_family(check):
    check()
```
"""

from interp.testing.case import FamilyCase
from interp.testing.checks import check_family
from interp.testing.reference import black_box_attention

__all__ = ["FamilyCase", "black_box_attention", "check_family"]
