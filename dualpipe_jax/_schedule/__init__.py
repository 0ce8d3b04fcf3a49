"""Compiles schedules to verified integer tables: pure Python and NumPy, never JAX.

generator -> `Program` -> place -> `Timeline` -> allocate -> `Allocation` -> emit -> `Tables`,
with a verifier after every pass. `compile.compile_program` runs them all.
"""
