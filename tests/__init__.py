"""A package, so that `tests.testing` is found before the `tests` that other packages install."""
