"""Features beside something else: neurons, each other in a plane."""
