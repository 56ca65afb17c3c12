"""An OpenAI-compatible server of one vision-language model that generates from a packed cache: `attnpack serve`."""
