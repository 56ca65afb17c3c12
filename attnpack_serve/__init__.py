"""`attnpack serve`: an OpenAI-compatible server that answers about images from a packed cache."""
