"""The type checker of the test runs: pyproject.toml names it to jaxtyping's import hook."""

from beartype import BeartypeConf, beartype

# An int passes for a float, as PEP 484 and mypy have it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
