"""What features do to a language model: steering and attribution."""
