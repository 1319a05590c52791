"""Many SAEs at once: sweeps over one stream."""
