"""The index of a dictionary's features over a corpus: what is counted, how it is built, stored and read."""
