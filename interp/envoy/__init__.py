"""nnsight over a live pipeline: the one place that knows nnsight, and fences what its version does unexpectedly.

Written for nnsight 0.8; each point below has a contract test in `tests/interp/test_envoy.py`:
- A ready pipeline is no model to nnsight. `_Components` is a module whose parts are the pipeline's own: no copy.
- `DiffusionModel` traces one sampling step unless told otherwise. Ours runs what the pipeline itself would run.
- Its `seed` draws on the model's device; ours on the CPU, the same noise everywhere, as in `interp.trace`.
- Outputs are copied as dicts, which diffusers' outputs do not survive (several invokes, a cache of all modules).
- With several invokes under guidance each reads a copy: an edit in place would be lost, so it is refused.
- Wrapping puts a controller into each module's `forward`. Whoever exchanges modules or `forward` later (LoRA, CPU
  offload) disables it silently: every run first follows the modules as they are now.
- A loop over open-ended steps ends by running out, with a warning: expected of an edit, and not shown.
- A compiled model would run without controllers or recompile without end: it runs eagerly within a trace.
- Whether a block waits for a module's value can be seen: probabilities pass `hook_probs` only where one does. A visit
  that is left out is counted all the same, because `tracer.iter` counts visits; a cache of all modules leaves them out.
"""

from interp.envoy.model import NNsightPipeline as NNsightPipeline
from interp.envoy.model import nnsight as nnsight
from interp.envoy.sessions import edits as edits
from interp.envoy.sessions import run_edits as run_edits
from interp.envoy.sessions import source as source
