"""The packages that compute the metrics are an extra; this says so where one is missing."""

from __future__ import annotations

from minilm_fast.errors import UserError


def missing(package: str) -> UserError:
    """The error for a package that is not installed."""
    return UserError(f"this metric needs {package}: pip install 'minilm_fast[metrics]'")
