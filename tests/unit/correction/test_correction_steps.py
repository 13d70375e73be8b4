import pytest

from iec_core.correction.correction_steps import parse_correction_steps, steps_within


@pytest.mark.parametrize(
    ("text", "total", "steps"),
    [
        ("all", 3, {0, 1, 2}),
        ("none", 3, set()),
        (" Full ", 3, {0, 1, 2}),  # without a cache every step is full
        ("ends:1/10", 50, {0, 1, 2, 3, 4, 45, 46, 47, 48, 49}),
        ("ends:1/20", 100, {0, 1, 2, 3, 4, 95, 96, 97, 98, 99}),
        ("ends:1/10", 4, {0, 3}),  # max(1, round(0.4)) steps at each end
        ("ends:1/10", 1, {0}),
        ("ends:1/2", 4, {0, 1, 2, 3}),
        ("first:2", 5, {0, 1}),
        ("last:2", 5, {3, 4}),
        ("first:1/5", 20, {0, 1, 2, 3}),
        ("first:1/5", 4, {0}),  # max(1, round(0.8))
        ("first:1/5", 2, {0}),  # max(1, round(0.4))
        ("first:1/1", 3, {0, 1, 2}),
        ("last:1/5", 20, {16, 17, 18, 19}),
        (" Last: 2/3 ", 3, {1, 2}),
        ("steps:0,1,48,49", 50, {0, 1, 48, 49}),
        (" Steps: 3 , 3,1 ", 5, {1, 3}),
        ("ENDS: 1 / 10", 10, {0, 9}),
    ],
)
def test_forms(text, total, steps):
    assert parse_correction_steps(text).of(total) == steps


def test_full_selects_the_caches_full_steps():
    assert parse_correction_steps("full").of(6, [0, 3, 5]) == {0, 3, 5}
    assert parse_correction_steps("full").of(6, []) == frozenset()
    assert parse_correction_steps("all").of(6, [0, 3]) == frozenset(range(6))


@pytest.mark.parametrize(
    ("text", "total", "inside"),
    [
        ("steps:0,5,10,15", 12, "steps:0,5,10"), ("steps:12", 12, "none"), ("first:3", 2, "first:2"), ("last:3", 8, "last:3"),
        ("last:3", 0, "none"), ("Ends:1/10", 4, "ends:1/10"), ("full", 4, "full"), ("middle", 4, "none"), ("", 4, "none"),
        ("first:1/5", 2, "first:1/5"), ("last:3/4", 0, "last:3/4"),
    ],
)  # fmt: skip
def test_steps_within_a_run(text, total, inside):
    assert steps_within(text, total) == inside
    assert all(step < total for step in parse_correction_steps(inside).of(total))


@pytest.mark.parametrize(
    "text", ["", "most", "ends", "ends:1", "ends:0/10", "ends:2/3", "ends:1/0", "first:0", "first:-1", "last:", "steps:",
             "first:0/5", "first:6/5", "last:1/0", "last:1/5/2", "steps:1,", "steps:-1", "steps:1;2", "all,none",
             "first:3 extra"],
)  # fmt: skip
def test_unknown_forms_are_refused_with_the_input_named(text):
    with pytest.raises(ValueError, match=r"^correction_steps: "):
        parse_correction_steps(text)


def test_unknown_word_lists_the_forms():
    with pytest.raises(
        ValueError, match=r"all, none, full, ends:1/10, first:1/5, first:3, last:1/5, last:3 or steps:0,1,48,49"
    ):
        parse_correction_steps("middle")


@pytest.mark.parametrize(("text", "step"), [("steps:0,10", 10), ("steps:12", 12)])
def test_step_outside_the_run_is_refused(text, step):
    assert parse_correction_steps(text).of(step + 1)
    with pytest.raises(ValueError, match=rf"names step {step}, but the run has 10 steps, numbered from 0 to 9"):
        parse_correction_steps(text).of(10)


@pytest.mark.parametrize("text", ["first:11", "last:11"])
def test_more_steps_than_the_run_has_are_refused(text):
    assert len(parse_correction_steps(text).of(11)) == 11
    with pytest.raises(ValueError, match=r"asks for 11 steps, but the run has 10; ask for at most 10"):
        parse_correction_steps(text).of(10)
