"""Parameters of tests that `make test-sweeps` tries and `make test` leaves out."""

import pytest


def in_sweeps(*values):
    """The values of one parameter, marked."""
    return [pytest.param(value, marks=pytest.mark.sweep) for value in values]
