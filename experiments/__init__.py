"""One folder a question: a README with the result, one script; they import only the public API."""
