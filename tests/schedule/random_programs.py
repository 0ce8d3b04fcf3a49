"""Random legal programs, of any routes."""

from hypothesis import strategies as st

from dualpipe_jax._schedule.ir import Action, Program


@st.composite
def programs(draw) -> Program:
    """Draws routes on the ring, gives each microbatch one, and runs ready actions at random."""
    P, S, N = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    forward_only = draw(st.booleans())

    def route():
        ranks = [draw(st.integers(0, P - 1))]
        for _ in range(S - 1):
            ranks.append((ranks[-1] + draw(st.integers(-1, 1))) % P)
        return ranks

    routes = [route() for _ in range(draw(st.integers(1, 3)))]
    route_of = [draw(st.sampled_from(routes)) for _ in range(N)]
    rows: list[list[Action]] = [[] for _ in range(P)]
    random = draw(st.randoms(use_true_random=False))
    ready = [Action("F", 0, m) for m in range(N)]
    while ready:
        action = ready.pop(random.randrange(len(ready)))
        kind, stage, microbatch = action
        rows[route_of[microbatch][stage]].append(action)
        if kind == "F" and stage < S - 1:
            ready.append(Action("F", stage + 1, microbatch))
        elif kind == "F" and not forward_only:
            ready.append(Action("I", stage, microbatch))
        elif kind == "I":
            ready.append(Action("W", stage, microbatch))
            if stage:
                ready.append(Action("I", stage - 1, microbatch))
    return Program("random", P, S, N, tuple(map(tuple, rows)), forward_only)
