"""`interp demo`: from a prompt to an answer on the bundled model, as a folder of figures and one page."""

from interp.demo.story import run_demo

__all__ = ["run_demo"]
