"""All that is HTML: reports, the dashboard, pages about one prompt, rating sheets."""
