"""What an experiment needs of a pod."""
