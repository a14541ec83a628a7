"""An HTTP server in OpenAI's format, on an engine. Needs the `serve` extra. Experimental.

# client   POST /v1/completions ──▶ CompletionRequest  ──▶ Engine.submit
#          one body, or events  ◀── CompletionResponse ◀── on_token, from the engine's thread
"""

from paged_jax.server.application import app as app
from paged_jax.server.application import run as run
