"""What a path or a name stands for: runs, releases and the files of others, opened once."""
