"""What training is made of, whatever the model: options, samples, losses, processes."""
