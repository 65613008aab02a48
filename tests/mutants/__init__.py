"""Mutants of the numeric code: a wrong sign, axis, mean or bound, each of which a test has to notice."""
