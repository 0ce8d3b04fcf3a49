"""The functions that a user calls: they check their arguments, and build steps."""
