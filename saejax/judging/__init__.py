"""How specific features are, and how well they can be explained: questions about them, who answers, what the answers say."""
