"""A server with OpenAI's API over any engine of ours."""
