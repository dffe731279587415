"""Work done ahead: in order, bounded, errors in their places, nothing left behind."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from unigendet.inference.prefetch import map_ahead

THREADS = {"threads": 3}


def test_order_does_not_depend_on_who_is_first():
    gates = [threading.Event() for _ in range(6)]

    def wait_for_the_next(i):
        """Each result is ready only after its successor's, within what runs at once."""
        if i % 2 == 0:
            assert gates[i + 1].wait(10)
        gates[i].set()
        return i * i

    assert list(map_ahead(wait_for_the_next, range(6), ahead=3, **THREADS)) == [i * i for i in range(6)]
    assert list(map_ahead(str, [], ahead=3, **THREADS)) == []


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_no_more_than_so_many_are_read_ahead(ahead):
    read, taken = [], 0

    def items():
        for i in range(20):
            read.append(i)
            yield i

    for i in map_ahead(lambda i: i, items(), ahead=ahead, **THREADS):
        assert i == taken
        taken += 1
        assert len(read) <= taken + ahead
    assert taken == 20


def test_items_are_read_in_the_consumers_thread_and_results_made_in_others():
    def items():
        for _ in range(3):
            yield threading.get_ident()

    here = threading.get_ident()
    pairs = list(map_ahead(lambda ident: (ident, threading.get_ident()), items(), ahead=2, **THREADS))
    assert all(reader == here != maker for reader, maker in pairs)


def test_an_error_comes_in_its_place():
    results = map_ahead(lambda i: 1 // (i - 2), range(5), ahead=4, **THREADS)
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_closing_drops_what_has_not_begun(monkeypatch):
    begun, gate = [], threading.Event()

    def slow(i):
        begun.append(i)
        if i:
            gate.wait(10)
        return i

    before = threading.active_count()
    results = map_ahead(slow, range(100), ahead=50, threads=2)
    assert next(results) == 0
    shutting_down, shutdown = threading.Event(), ThreadPoolExecutor.shutdown

    def shut_down(pool, **options):
        """Drops what has not begun; only then may those that have begun end, for which the pool still waits."""
        shutdown(pool, wait=False, **options)
        shutting_down.set()
        shutdown(pool)

    def open_the_gate():
        shutting_down.wait(10)
        gate.set()

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shut_down)
    opener = threading.Thread(target=open_the_gate)
    opener.start()
    results.close()
    assert shutting_down.is_set()
    opener.join()
    assert len(begun) < 50
    assert threading.active_count() == before
