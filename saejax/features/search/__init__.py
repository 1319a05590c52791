"""Features found by what they do: on a prompt, for an answer, on sets of prompts, by text, by direction."""
