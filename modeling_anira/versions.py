"""The transformers releases that this model runs on. Imported before anything that older ones lack."""

from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.versions import require_version

# The one place of the lower bound; pyproject.toml repeats it, held to this by a test.
TRANSFORMERS = "transformers>=5.5.4"

require_version(TRANSFORMERS, f'ANIRA does not run on older ones: pip install -U "{TRANSFORMERS}"')

# transformers 5.24 calls `cache` what was `past_key_values`, in outputs and in what its own functions take. Here it is
# `past_key_values` throughout; `cache` may be the same, or the paged cache of continuous batching, which is no `Cache`.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
