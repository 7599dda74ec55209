"""The OpenAI-compatible HTTP API over an engine: `app.create_app`, run by `server.serve`."""
