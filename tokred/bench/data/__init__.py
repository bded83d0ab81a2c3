"""The embedded default: weights, and a sample of Fashion-MNIST on photographs."""
