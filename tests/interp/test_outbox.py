"""Parcels from a device: in order, a bounded number at a time, errors told. The device is played, no GPU is needed."""

import threading

import pytest
import torch

from interp import outbox
from interp.outbox import Outbox


class OnDevice(torch.Tensor):
    is_cuda = True


class Arrival:
    """An event that happens when the test says so."""

    def __init__(self):
        self.happened = threading.Event()

    def synchronize(self):
        assert self.happened.wait(10)


@pytest.fixture
def arrivals(monkeypatch):
    made = []

    def copies(tensors):
        made.append(Arrival())
        return {name: t.as_subclass(torch.Tensor).clone() for name, t in tensors.items()}, made[-1]

    monkeypatch.setattr(outbox, "_copies", copies)
    return made


def parcel(number):
    return {"x": torch.tensor([number]).as_subclass(OnDevice)}


def test_parcels_arrive_in_order_and_later_than_sent(arrivals):
    box, seen = Outbox(depth=3), []
    for number in range(3):
        box.send(parcel(number), lambda arrays: seen.append(int(arrays["x"][0])))
    assert seen == []
    for arrival in reversed(arrivals):
        arrival.happened.set()
    box.flush()
    assert seen == [0, 1, 2]
    box.close()


def test_a_full_box_waits_for_its_oldest_parcel(arrivals):
    box, seen = Outbox(depth=2), []

    def send_all():
        for number in range(4):
            box.send(parcel(number), lambda arrays: seen.append(int(arrays["x"][0])))

    sender = threading.Thread(target=send_all)
    sender.start()
    sender.join(0.3)
    assert sender.is_alive() and len(arrivals) == 3  # the third waits for the first
    for _ in range(40):
        for arrival in list(arrivals):
            arrival.happened.set()
        sender.join(0.05)
    assert not sender.is_alive()
    box.flush()
    assert seen == [0, 1, 2, 3]
    box.close()


def test_what_a_delivery_raises_is_raised_where_parcels_are_sent(arrivals):
    box = Outbox()

    def fail(arrays):
        raise ValueError("no room")

    box.send(parcel(0), fail)
    arrivals[0].happened.set()
    with pytest.raises(ValueError, match="no room"):
        box.flush()
    box.close()


def test_nothing_is_delivered_after_the_end(arrivals):
    box, seen = Outbox(), []
    for number in range(3):
        box.send(parcel(number), lambda arrays: seen.append(int(arrays["x"][0])))
    threading.Timer(0.2, lambda: [a.happened.set() for a in arrivals]).start()
    box.close()
    at_the_end = list(seen)
    assert at_the_end in ([], [0])  # the one that was under way, and none behind it
    threading.Event().wait(0.3)
    assert seen == at_the_end
