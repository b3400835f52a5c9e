"""Tasks and what becomes of them: whatever fails in whatever order, every sample ends up written or given up, once."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.jobs.agenda import Agenda
from interp.jobs.work import Outcome
from interp.stores.chunks import batch_rows


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    workers=st.integers(1, 4),
    rows=st.one_of(st.none(), st.integers(1, 8)),
    retry=st.booleans(),
    data=st.data(),
)
def test_every_sample_is_settled_once(sizes, workers, rows, retry, data):
    batch = [b for b, size in enumerate(sizes) for _ in range(size)]
    n = len(batch)
    status = np.array(data.draw(st.lists(st.sampled_from([0, 1, 2]), min_size=n, max_size=n)), "int8")
    bad = data.draw(st.dictionaries(st.integers(0, n - 1), st.sampled_from(["raised", "died", "hung"])))
    rows = rows or batch_rows(batch)
    agenda = Agenda(batch, status, rows, retry_failed=retry)
    wanted = {i for i in range(n) if status[i] == 0 or (retry and status[i] == 2)}
    assert agenda.waiting == len(wanted)
    written, lost, running, rounds = set(), set(), [], 0
    while len(agenda) or running:
        rounds += 1
        assert rounds < 500
        while len(running) < workers and (task := agenda.next()) is not None:
            running.append(task)
        chunks = [{i // rows for i in task.waiting} for task in running]
        assert sum(map(len, chunks)) == len(set().union(*chunks))  # no chunk of statuses is shared
        assert running  # it never stands still
        task = running.pop(data.draw(st.integers(0, len(running) - 1)))
        assert task.samples == tuple(i for i in range(n) if batch[i] == task.batch)
        assert {*task.waiting} <= {*task.members} <= {*task.samples}
        culprits = [i for i in task.members if i in bad]
        outcome = Outcome(bad[culprits[0]], "why") if culprits else Outcome("done")
        if not culprits and rounds < 20 and data.draw(st.booleans()):  # its process ended for another task's sake
            outcome, culprits = Outcome("lost", "why"), [task.members[0]]
        done = {*task.waiting} if not culprits else set(data.draw(st.sets(st.sampled_from(task.waiting))) - {*bad})
        assert not done & (written | lost)
        written |= done
        lost |= {f.sample for f in agenda.settle(task, outcome, done)}
    assert written | lost == wanted
    assert not written & lost
    assert lost == wanted & {*bad}


def test_a_task_that_a_process_died_of_is_tried_again_whole_first():
    agenda = Agenda([0, 0, 0, 0], np.zeros(4, "int8"), 4, retry_failed=False)
    first = agenda.next()
    assert agenda.settle(first, Outcome("died", "x")) == []
    again = agenda.next()
    assert again.members == again.waiting == (0, 1, 2, 3)
    agenda.settle(again, Outcome("died", "x"))
    half = agenda.next()
    assert (half.samples, half.members) == ((0, 1, 2, 3), (0, 1))
