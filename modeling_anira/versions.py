"""The transformers releases that this model runs on. Imported before anything that older ones lack."""

from transformers.utils.versions import require_version

# The one place of the lower bound; pyproject.toml repeats it, held to this by a test.
TRANSFORMERS = "transformers>=5.5.4"

require_version(TRANSFORMERS, f'ANIRA does not run on older ones: pip install -U "{TRANSFORMERS}"')
