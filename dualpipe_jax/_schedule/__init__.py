"""Compiles schedules to verified integer tables: pure Python and NumPy, never JAX.

generator -> `Program` -> place -> `Timeline` -> allocate -> `Allocation` -> emit -> `Tables`,
with a verifier after every pass. The aligned timetable takes two passes more, `align` and
`release`, from Timeline to Timeline. `compile.compile_program` runs them all.
"""
