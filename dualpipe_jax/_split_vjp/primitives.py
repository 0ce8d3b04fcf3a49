"""Names the primitives that the passes treat specially, in sets, each with its reason.

A test requires that the installed JAX has every primitive that is named here.
"""

# JAX 0.12 has these, JAX 0.10 does not.
NEWER = frozenset({"log2", "one_minus_square"})

# Cheap enough to run twice anywhere: no reduction, no contraction, nothing transcendental. XLA
# fuses these into whatever reads them.
CHEAP = frozenset(
    """
    abs add add_any and broadcast_in_dim ceil clamp convert_element_type copy div eq floor ge gt
    integer_pow iota is_finite le lt max min mul ne neg not one_minus_square or real reshape rev
    round rsqrt select_n sign slice sqrt square squeeze stop_gradient sub transpose unstack xor
    """.split()  # noqa: SIM905
)
# Cheap enough to run again in the backward, rather than keep a value for each: elementwise too, and
# a small part of the work of the contraction that reads them. (On a TPU v5e, a GELU's input and
# output kept in slots cost more time than its second tanh; a softmax kept its exponentials twice.)
CHEAP_IN_BACKWARD = CHEAP | frozenset(
    """
    acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1
    lgamma log log1p log2 logistic pow rem sin sinh tan tanh
    """.split()  # noqa: SIM905
)
# The tail of a weight gradient that may run with the input gradient, so that the small result is
# kept in place of the operand.
REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or"})
# They multiply by the precision that the platform chooses, unless the equation names one.
CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated"})

# Sums of the gradients of several uses; JAX writes `add_any`, a model may write `add`.
SUMS = frozenset({"add", "add_any"})
# The steps that may follow an equation that makes dx and dW together, before dW is complete: cheap
# steps, and the sum over devices of a weight that they share.
AFTER_JOINT_GRADIENT = CHEAP | {"psum", "psum_invariant", "reduce_scatter"}
# Linear, and alike for every device: a sum over devices commutes with these.
COMMUTE_WITH_SUMS = frozenset(
    {"convert_element_type", "copy", "neg", "reshape", "squeeze", "transpose"}
)
# JAX makes the zero gradient of an unused input with these.
KEEP_ZERO = frozenset({"broadcast_in_dim", "convert_element_type", "reshape", "transpose", "copy"})
# A look-up in a table consists of these, and is less work than choosing whether to run it.
LOOK_UP = CHEAP_IN_BACKWARD | {"concatenate", "dynamic_slice", "gather", "iota", "pad"}

# They put elements elsewhere; a reader of the result can as well read the operand. (JAX 0.12 has
# `stack`, and `unstack` where an array is iterated over, for earlier concatenations and slices.)
MOVES = frozenset({"concatenate", "pad", "rev", "stack", "transpose"})
# Their result is only moved if their operands are: a sum of padded values is a concatenation.
KEEP_MOVED = frozenset({"add_any", "reshape", "squeeze"})
# They give a value or parts of it, in another order or shape.
VIEWS = frozenset("copy reshape rev slice split squeeze transpose unstack".split())  # noqa: SIM905
# They change the shape, and leave the elements in their order.
RESHAPES = frozenset({"broadcast_in_dim", "reshape", "squeeze"})
# They give an element, or a function of it, at the index that the operand has it at.
ELEMENTWISE = (
    (CHEAP_IN_BACKWARD | {"name", "optimization_barrier", "pvary"})
    - RESHAPES
    - {"iota", "rev", "slice", "transpose", "unstack"}
)
