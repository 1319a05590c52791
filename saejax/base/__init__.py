"""The ground that all rooms stand on: errors, files, logs, devices. Knows no config and nothing above it."""
