"""The command `saejax`: the only room that knows options by their names and prints results."""
