"""Searches for orders: placement, sizes, costs, a limit of memory -> a fast program.

Read `search` first: `seeds` gives orders to begin with, `loops` replays and anneals them (by Numba
where it is installed), `bounds` says when none can be faster, `problem` translates programs.
"""
