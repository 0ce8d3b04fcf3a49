from dualpipe_jax._schedule.grammar import parse_program
from dualpipe_jax._schedule.place import place_shortest


def test_every_action_runs_as_soon_as_it_can():
    timeline = place_shortest(parse_program("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1", name="x"))
    assert [
        " ".join(action or "." for action in row) for row in zip(*timeline.actions, strict=True)
    ] == [
        "0F0 0F1 . 0I0 0W0 . 0I1 0W1",
        ". 1F0 1I0 1W0 1F1 1I1 1W1 .",
    ]
