"""What older releases of a library lack, skipped by name."""

import pytest
import transformers
from packaging.version import Version


def needs_transformers(version: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test under an older transformers."""
    too_old = Version(transformers.__version__) < Version(version)
    return pytest.mark.skipif(too_old, reason=f"before transformers {version}, {reason}")
