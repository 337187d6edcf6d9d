"""Making adapters: the closed-form fit, the data mix, the losses and the training loop."""
