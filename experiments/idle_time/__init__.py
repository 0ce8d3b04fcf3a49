"""How much of a step's time each schedule idles, by formula and by its executed tables."""
