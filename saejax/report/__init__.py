"""What a finished run shows: the short table and `report.html`."""
