"""Does compute hide the communication of the steady loop? Read off programs for accelerators."""
