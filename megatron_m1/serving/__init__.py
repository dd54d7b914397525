"""A trained model behind an OpenAI-compatible HTTP server."""
