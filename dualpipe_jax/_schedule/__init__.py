"""Compiles schedules to verified integer tables: pure Python and NumPy, never JAX.

generator -> `Program` -> place -> `Timeline` -> allocate -> `Allocation` -> emit -> `Tables`,
with a verifier after every pass. Before placing, `refine_opcodes` decides how each I and its W run.
The aligned timetable takes two more passes, `align` and `release`, from Timeline to Timeline.
`compile.compile_program` runs them all; `actions` lists the reads, writes and frees of each opcode.
"""
