"""Questions asked of run stores: a probe is a function of a run that returns labelled, unit-bearing arrays.

>>> from interp.stores import synthetic_run
>>> from interp.probes import find_probe
>>> find_probe("frequency_energy")(synthetic_run(samples=1, seed=0))["variation"].dims
('sample', 'step', 'band')

Nothing here imports torch, and matplotlib is imported only when something is drawn.
"""

from interp.probes.base import Parameter, Probe, probe
from interp.probes.discovery import PluginInfo, find_probe, list_probes
from interp.probes.needs import require
from interp.probes.plotting import plot

__all__ = ["Parameter", "PluginInfo", "Probe", "find_probe", "list_probes", "plot", "probe", "require"]
