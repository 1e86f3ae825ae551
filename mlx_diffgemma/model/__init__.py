"""The network: configuration, layers, K/V cache, vision tower and the two modes."""
