"""Which concepts have a feature of their own, against how often the training text names them."""
