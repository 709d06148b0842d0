"""Training: text to tokens (`data`) and what consumes them."""
