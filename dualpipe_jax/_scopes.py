"""The names under which the parts of the step stand in a compiled program, as `jax.named_scope`s.

Every instruction that XLA keeps has them in its metadata (`op_name`), one after the other: the
segment of the timetable, then the action. What reads compiled programs finds them by these.
"""

# Segments: ticks that each rank runs by its opcode, and beats, the same code on all ranks.
RAMP, STEADY = "dualpipe.ramp", "dualpipe.steady"
# Actions.
FORWARD, INPUT_GRAD, WEIGHT_GRAD = (
    f"dualpipe.{name}" for name in ("forward", "input_grad", "weight_grad")
)
EMBED, EMBED_GRAD, HEAD = (f"dualpipe.{name}" for name in ("embed", "embed_grad", "head"))
# Transfers between ranks.
SEND = "dualpipe.send"
