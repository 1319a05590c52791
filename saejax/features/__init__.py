"""What the features of a trained SAE are: an index of their activations over a corpus, and pages to look at them."""
