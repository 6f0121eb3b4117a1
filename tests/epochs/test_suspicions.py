"""What looks wrong is mended once it has done so for a while, however badly it is seen."""

from __future__ import annotations

from agentmem_cluster.epochs.suspicions import Subject, Suspicions

LOST = Subject("s00", 3, "n1")


def test_a_replica_is_suspected_for_a_while_before_it_is_certain() -> None:
    suspicions = Suspicions(3.0)
    for now_s in (10.0, 11.0, 12.9):
        suspicions.saw(LOST, "lost", now_s)
        assert not suspicions.is_certain(LOST, now_s)
    assert suspicions.is_certain(LOST, 13.0)


def test_a_look_that_does_not_reach_a_member_does_not_begin_the_wait_anew() -> None:
    suspicions = Suspicions(3.0)
    suspicions.saw(LOST, "lost", 10.0)
    suspicions.keep(lambda one: one.epoch == 3)  # rounds in which n1 did not answer
    suspicions.saw(Subject("s00", 3, "n2"), "lost", 12.0)
    suspicions.saw(LOST, "lost", 13.5)
    assert suspicions.is_certain(LOST, 13.5)


def test_another_member_has_a_wait_of_its_own() -> None:
    suspicions = Suspicions(3.0)
    suspicions.saw(LOST, "lost", 10.0)
    suspicions.saw(Subject("s00", 3, "n2"), "lost", 12.0)
    assert not suspicions.is_certain(Subject("s00", 3, "n2"), 13.0)
    assert suspicions.is_certain(LOST, 13.0)


def test_what_is_well_again_or_wrong_in_another_way_is_waited_for_anew() -> None:
    suspicions = Suspicions(3.0)
    suspicions.saw(LOST, "lost", 10.0)
    suspicions.saw(LOST, "", 11.0)
    suspicions.saw(LOST, "lost", 12.0)
    assert not suspicions.is_certain(LOST, 14.0)
    suspicions.saw(LOST, "too far behind", 14.5)
    assert not suspicions.is_certain(LOST, 15.5)
    assert suspicions.is_certain(LOST, 17.5)


def test_an_epoch_that_is_over_is_forgotten() -> None:
    suspicions = Suspicions(3.0)
    suspicions.saw(LOST, "lost", 10.0)
    suspicions.keep(lambda one: one.epoch == 4)
    assert not suspicions.is_certain(LOST, 20.0)


def test_two_glimpses_of_a_member_that_was_away_long_do_not_make_it_certain() -> None:
    suspicions = Suspicions(3.0)
    suspicions.saw(LOST, "lost", 10.0)  # it was starting
    suspicions.saw(LOST, "lost", 200.0)  # and is again
    assert not suspicions.is_certain(LOST, 200.0)
    suspicions.saw(LOST, "lost", 203.0)
    assert suspicions.is_certain(LOST, 203.0)
