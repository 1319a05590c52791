"""Many SAEs at once: sweeps over one stream, scaling laws through what they give."""
