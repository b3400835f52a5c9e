"""What every way of writing a run must satisfy, for tests of a writer; `synthetic_run` for tests of a reader.

```python
from interp.stores.testing import RunStoreTests

class TestMyWriter(RunStoreTests):
    @pytest.fixture
    def make_writer(self, tmp_path):
        return lambda layout: create_run(tmp_path / "run.zarr", layout)
```
"""

from collections.abc import Callable

import numpy as np
import pytest

from interp.stores.errors import StoreError
from interp.stores.integrity import verify
from interp.stores.schema import Layout
from interp.stores.small import small_layout, small_tokens, small_values, write_sample
from interp.stores.synthetic import synthetic_run
from interp.stores.table import DONE, FAILED, TODO
from interp.stores.validation import validate
from interp.stores.writer import RunWriter

__all__ = ["RunStoreTests", "small_layout", "small_tokens", "small_values", "synthetic_run", "write_sample"]

MakeWriter = Callable[[Layout], RunWriter]


class RunStoreTests:
    """Tests of the writer that the fixture `make_writer` (layout → RunWriter) makes; subclass and give it."""

    def test_a_new_run_is_all_to_do(self, make_writer: MakeWriter) -> None:
        """Nothing is done in a new run, and it is valid already."""
        with make_writer(small_layout()) as writer:
            assert list(writer.status) == [TODO] * 3
            assert validate(writer.run.tree) == []

    @pytest.mark.parametrize("stepwise", [True, False])
    def test_what_is_written_is_read(self, make_writer: MakeWriter, stepwise: bool) -> None:
        """Every value comes back, whether appended or put."""
        layout = small_layout()
        with make_writer(layout) as writer:
            for i in range(3):
                write_sample(writer, i, stepwise=stepwise)
        assert list(writer.status) == [DONE] * 3
        assert verify(writer.run) == []
        for i in range(3):
            for name, value in small_values(layout, i).items():
                if name != "images/thumb":
                    np.testing.assert_array_equal(writer.run.tree[name].isel(sample=i), value)

    def test_samples_appended_together_are_as_each_alone(self, make_writer: MakeWriter) -> None:
        """Any split of a run's samples gives the same run."""
        layout = small_layout()
        values = [small_values(layout, i) for i in range(3)]
        with make_writer(layout) as writer:
            for samples in ((0, 2), (1,)):
                for i in samples:
                    writer.begin(i)
                for name, array in layout.arrays.items():
                    if array.steps:
                        for step in range(array.steps):
                            writer.append_together(samples, name, np.stack([values[i][name][step] for i in samples]))
                    elif name != "images/thumb":
                        for i in samples:
                            writer.put(i, name, values[i][name])
                for i in samples:
                    writer.commit(i)
        for name in ("trajectory/latents", "attention/4x4/probs", "images/image"):
            np.testing.assert_array_equal(np.asarray(writer.run.tree[name]), np.stack([v[name] for v in values]))

    def test_what_was_not_written_is_nan(self, make_writer: MakeWriter) -> None:
        """A sample that is not done reads as NaN, not as 0."""
        with make_writer(small_layout()) as writer:
            write_sample(writer, 1)
        latents = writer.run.latents
        assert np.isnan(latents.isel(sample=[0, 2])).all()
        assert np.isfinite(latents.isel(sample=1)).all()
        assert len(writer.run.done) == 1

    def test_an_incomplete_sample_is_not_committed(self, make_writer: MakeWriter) -> None:
        """Commit names what is missing, and the sample can go on."""
        with make_writer(small_layout()) as writer:
            writer.begin(0)
            writer.append(0, "trajectory/latents", np.zeros((2, 4, 4)))
            with pytest.raises(StoreError, match=r"trajectory/latents \(1 of 13 steps\)"):
                writer.commit(0)
            assert writer.status[0] == TODO

    def test_a_failed_sample_says_why_and_can_be_tried_again(self, make_writer: MakeWriter) -> None:
        """A failure is recorded; beginning again starts over."""
        with make_writer(small_layout()) as writer:
            writer.begin(0)
            writer.append(0, "trajectory/latents", np.ones((2, 4, 4)))
            writer.fail(0, "out of memory")
            writer.drain()
            assert writer.status[0] == FAILED
            assert writer.run.samples.loc[0, "error"] == "out of memory"
            write_sample(writer, 0)
        assert verify(writer.run) == []
        assert writer.run.samples.loc[0, "error"] == ""

    def test_the_callers_buffer_may_be_reused(self, make_writer: MakeWriter) -> None:
        """What is handed over is copied."""
        block = np.empty((2, 4, 4), "float32")
        with make_writer(small_layout(n=1)) as writer:
            write_sample(writer, 0)
        with make_writer(small_layout(n=1, again=True)) as writer:
            writer.begin(0)
            for step in range(13):
                block[:] = step
                writer.append(0, "trajectory/latents", block)
            for name, value in small_values(writer.layout, 0).items():
                if name not in ("trajectory/latents", "images/thumb"):
                    writer.put(0, name, value)
                    value[...] = 0
            writer.commit(0)
        np.testing.assert_array_equal(writer.run.latents.values[0, :, 0, 0, 0], np.arange(13))

    def test_a_run_grows(self, make_writer: MakeWriter) -> None:
        """Samples are appended at the end; those before stay as they are."""
        with make_writer(small_layout(n=1)) as writer:
            write_sample(writer, 0)
            new = writer.grow({"prompt": ["x", "y"], "seed": [7, 8]}, {"attention/4x4": small_tokens(2)})
            assert list(new) == [1, 2]
            for i in new:
                write_sample(writer, i)
            assert list(writer.run.samples["seed"]) == [0, 7, 8]
        assert verify(writer.run) == []
        assert len(writer.run.done) == 3

    @pytest.mark.parametrize(
        ("mistake", "says"),
        [
            (lambda w: w.begin(3), "sample 3 was begun, but the run has 3"),
            (lambda w: w.append(0, "trajectory/latents", 0), "call begin"),
            (
                lambda w: (w.begin(0), w.append(0, "trajectory/latent", 0)),
                "did you mean 'trajectory/latents'",
            ),
            (lambda w: (w.begin(0), w.append(0, "trajectory/latents", np.zeros(3))), r"\(2, 4, 4\)"),
            (lambda w: (w.begin(0), w.append(0, "images/image", 0)), "use put"),
            (
                lambda w: (
                    w.begin(0),
                    w.begin(1),
                    w.append_together((0, 1), "trajectory/latents", np.zeros((1, 2, 4, 4))),
                ),
                r"\(2, 2, 4, 4\)",
            ),
            (
                lambda w: (
                    w.begin(0),
                    w.begin(1),
                    w.append(0, "trajectory/latents", np.zeros((2, 4, 4))),
                    w.append_together((0, 1), "trajectory/latents", np.zeros((2, 2, 4, 4))),
                ),
                "same steps",
            ),
            (lambda w: w.commit(0), "call begin"),
        ],
    )
    def test_mistakes_are_named(
        self, make_writer: MakeWriter, mistake: Callable[[RunWriter], object], says: str
    ) -> None:
        """Each mistake raises StoreError with what is needed to mend it."""
        with make_writer(small_layout()) as writer, pytest.raises(StoreError, match=says):
            mistake(writer)

    def test_a_finished_sample_is_not_begun_again(self, make_writer: MakeWriter) -> None:
        """What is done stays."""
        with make_writer(small_layout()) as writer:
            write_sample(writer, 0)
            writer.drain()
            with pytest.raises(StoreError, match="already done"):
                writer.begin(0)
