"""`kvzip serve`: documents and answers over HTTP, in OpenAI's words. Needs the extra `serve`."""
